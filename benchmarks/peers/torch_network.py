"""The network of `hexa_jax` in plain PyTorch: ResNet and projection head with one BatchNorm set per branch.

Legend: N images, V crops, C channels, S side, D embedding. Images are [N, C, S, S] tensors in
    channels-last memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.case import Case

BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}


class BranchNorm(nn.Module):
    """Training-mode BatchNorm with scale, shift and statistics of the branch that is asked for (AdvProp)."""

    def __init__(self, channels: int, branches: Sequence[str]):
        super().__init__()
        self.sets = nn.ModuleDict({branch: nn.BatchNorm2d(channels) for branch in branches})

    def forward(self, x: Tensor, branch: str, write: bool) -> Tensor:
        """x [N, C, ...]; `write` says whether the running statistics move."""
        norm: Any = self.sets[branch]
        mean, variance = (norm.running_mean, norm.running_var) if write else (None, None)
        return F.batch_norm(
            x, mean, variance, norm.weight, norm.bias, training=True, momentum=0.1, eps=1e-5
        )


def conv(channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Convolution without bias, padded as in torchvision."""
    return nn.Conv2d(channels, out_channels, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    """relu(shortcut(x) + body(x)): two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the channels."""

    def __init__(
        self, channels: int, width: int, stride: int, bottleneck: bool, branches: Sequence[str]
    ):
        super().__init__()
        self.out_channels = out = width * (4 if bottleneck else 1)
        plan = (
            [(width, 1, 1), (width, 3, stride), (out, 1, 1)]
            if bottleneck
            else [(width, 3, stride), (out, 3, 1)]
        )
        inputs = [channels, *(features for features, _, _ in plan)]
        self.convs = nn.ModuleList(conv(inputs[i], *layer) for i, layer in enumerate(plan))
        self.norms = nn.ModuleList(BranchNorm(features, branches) for features, _, _ in plan)
        self.has_shortcut = stride != 1 or channels != out
        if self.has_shortcut:
            self.shortcut, self.shortcut_norm = (
                conv(channels, out, 1, stride),
                BranchNorm(out, branches),
            )

    def forward(self, x: Tensor, branch: str, write: bool) -> Tensor:
        y = x
        for i, (convolution, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(convolution(y), branch, write)
            if i + 1 < len(self.convs):
                y = F.relu(y, inplace=True)
        if self.has_shortcut:
            x = self.shortcut_norm(self.shortcut(x), branch, write)
        return F.relu(x + y, inplace=True)


class ResNet(nn.Module):
    """[N, 3, S, S] -> pooled float32 features [N, feature_dim]."""

    def __init__(self, case: Case, branches: Sequence[str]):
        super().__init__()
        channels, imagenet = case.base_channels, case.stem == "imagenet"
        self.conv1 = conv(3, channels, 7, 2) if imagenet else conv(3, channels, 3)
        self.norm1 = BranchNorm(channels, branches)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()
        blocks: list[Block] = []
        for stage, count in enumerate(BLOCKS[case.depth]):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                block = Block(
                    channels, case.base_channels * 2**stage, stride, case.depth >= 50, branches
                )
                blocks.append(block)
                channels = block.out_channels
        self.blocks = nn.ModuleList(blocks)
        self.feature_dim = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if case.zero_init_residual:
            for block in blocks:
                last: Any = block.norms[-1]
                for norm in last.sets.values():
                    nn.init.zeros_(norm.weight)

    def forward(self, x: Tensor, branch: str, write: bool) -> Tensor:
        x = self.pool(F.relu(self.norm1(self.conv1(x), branch, write), inplace=True))
        for block in self.blocks:
            x = block(x, branch, write)
        return x.float().mean(dim=(2, 3))


class Head(nn.Module):
    """Linear, optional BatchNorm, ReLU, Linear."""

    def __init__(self, features: int, case: Case, branches: Sequence[str]):
        super().__init__()
        hidden = case.head_hidden or features
        self.linear1, self.linear2 = nn.Linear(features, hidden), nn.Linear(hidden, case.head_dim)
        self.norm = BranchNorm(hidden, branches) if case.head_batch_norm else None

    def forward(self, x: Tensor, branch: str, write: bool) -> Tensor:
        x = self.linear1(x)
        if self.norm is not None:
            x = self.norm(x, branch, write)
        return self.linear2(F.relu(x, inplace=True))


class Network(nn.Module):
    """Crops in [0, 1], one tensor [N * V_r, 3, S, S] per resolution -> unit vectors, float32 [N, V, D]."""

    mean: Tensor
    std: Tensor

    def __init__(self, case: Case):
        super().__init__()
        branches = ("clean", "adversarial") if case.alpha1 else ("clean",)
        self.backbone = ResNet(case, branches)
        self.head = Head(self.backbone.feature_dim, case, branches)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(case, f"pixel_{name}")).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, crops: Sequence[Tensor], num: int, branch: str, write: bool) -> Tensor:
        """`num` is N; each resolution has BatchNorm statistics of its own, the head sees all crops at once."""
        pooled = [
            self.backbone((x - self.mean) / self.std, branch, write).view(
                num, -1, self.backbone.feature_dim
            )
            for x in crops
        ]
        features = torch.cat(pooled, dim=1)
        z = self.head(features.flatten(0, 1), branch, write).float()
        return F.normalize(z, dim=-1, eps=1e-12).view(num, features.shape[1], -1)
