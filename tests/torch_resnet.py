"""ResNet in plain PyTorch under torchvision's names: what other people's weights are for, to compare our network with.

Written from torchvision's documented layout (version 1.5: stride on the 3x3 convolution), without reading `hexa_jax`.
"""

import torch
from torch import nn

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def conv(channels, out_channels, size, stride=1):
    return nn.Conv2d(channels, out_channels, size, stride, padding=(size - 1) // 2, bias=False)


class Residual(nn.Module):
    """relu(shortcut(x) + body(x)); subclasses make the body, and the shortcut where stride or width change."""

    expansion: int

    def shortcut(self, channels, width, stride):
        out_channels = width * self.expansion
        if stride == 1 and channels == out_channels:
            return None
        return nn.Sequential(conv(channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x):
        return torch.relu(self.body(x) + (x if self.downsample is None else self.downsample(x)))


class BasicBlock(Residual):
    expansion = 1

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = self.shortcut(channels, width, stride)

    def body(self, x):
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


class Bottleneck(Residual):
    expansion = 4

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = self.shortcut(channels, width, stride)

    def body(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(x)))))


class TorchResNet(nn.Module):
    """[N, 3, H, W] -> pooled features [N, F] and the feature maps of the four stages, [N, C, H, W] each.

    Args:
        depth: 18, 34, 50 or 101.
        base_channels: of the stem; 64 is torchvision's.
        stem: "imagenet" (7x7 with stride 2, max-pool) or "cifar" (3x3 with stride 1, no pool).
    """

    def __init__(self, depth, base_channels=64, stem="imagenet"):
        super().__init__()
        block = Bottleneck if depth >= 50 else BasicBlock
        self.conv1 = conv(3, base_channels, 7, 2) if stem == "imagenet" else conv(3, base_channels, 3)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        channels = base_channels
        for stage, count in enumerate(BLOCKS[depth], start=1):
            width, blocks = base_channels * 2 ** (stage - 1), []
            for number in range(count):
                blocks.append(block(channels, width, 2 if stage > 1 and number == 0 else 1))
                channels = width * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return x.mean(dim=(2, 3)), maps
