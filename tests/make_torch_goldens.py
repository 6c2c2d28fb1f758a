"""Make `tests/goldens/torch_resnet.npz`: what PyTorch's ResNets compute from weights that NumPy can draw again.

Run it apart from the project's own environment, which has no torch:

    python3 -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install torch==2.13.0 numpy
    /tmp/torchenv/bin/python tests/make_torch_goldens.py

The functions and tables up to `main` are what `test_weights.py` shares; they need NumPy alone.
"""

import json
import math
import pathlib
import zlib

import numpy as np

GOLDENS = pathlib.Path(__file__).resolve().parent / "goldens" / "torch_resnet.npz"
NETWORKS = {  # depth, base_channels, stem
    "resnet18": (18, 4, "imagenet"),
    "resnet34": (34, 4, "imagenet"),
    "resnet50": (50, 4, "imagenet"),
    "resnet50w2": (50, 8, "imagenet"),
    "resnet18_cifar": (18, 4, "cifar"),
}
SIDES = {"even": (64, 64), "odd": (57, 43)}  # height, width
SAMPLES = 64  # values kept of each feature map


def rng_of(name):
    """A generator whose numbers depend on the name alone."""
    return np.random.default_rng([2026, zlib.crc32(name.encode())])


def draw(name, shape):
    """float32 array of a torchvision name: kernels keep the size of what goes through, variances are positive."""
    rng, shape = rng_of(name), tuple(shape)
    if name.endswith("num_batches_tracked"):
        return np.array(7, np.int64)
    if len(shape) == 4:
        value = rng.normal(size=shape) * math.sqrt(1 / math.prod(shape[1:]))
    elif name.endswith((".weight", ".running_var")):
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = 0.1 * rng.normal(size=shape)
    return value.astype(np.float32)


def draw_all(shapes):
    """{name: array} of {name: shape}."""
    return {name: draw(name, shape) for name, shape in shapes.items()}


def images(height, width):
    """float32 [2, H, W, 3]: noise, and the second twice as strong and brighter to the right."""
    noise = rng_of(f"images {height}x{width}").normal(size=(2, height, width, 3))
    noise[1] = 2 * noise[1] + np.linspace(-1, 2, width)[:, None]
    return noise.astype(np.float32)


def samples(stage, feature_map):
    """SAMPLES values of a feature map [N, H, W, C] at places that its stage and shape determine."""
    flat = np.asarray(feature_map).reshape(-1)
    return flat[rng_of(f"stage {stage}").integers(0, flat.size, SAMPLES)]


def main():
    """Compute in float64, write float32."""
    import torch  # not at the top: the test imports this file where there is no torch
    from torch_resnet import TorchResNet

    goldens = {}
    for name, (depth, base_channels, stem) in NETWORKS.items():
        network = TorchResNet(depth, base_channels, stem).eval()
        shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
        network.load_state_dict({key: torch.from_numpy(value) for key, value in draw_all(shapes).items()})
        goldens[f"{name}/shapes"] = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
        for side, (height, width) in SIDES.items():
            x = torch.from_numpy(images(height, width)).permute(0, 3, 1, 2)
            with torch.no_grad():
                pooled, maps = network.double()(x.double())
            goldens[f"{name}/{side}/pooled"] = pooled.numpy().astype(np.float32)
            for stage, values in enumerate(maps, start=1):
                values = values.permute(0, 2, 3, 1).numpy().astype(np.float32)
                goldens[f"{name}/{side}/shape{stage}"] = np.array(values.shape, np.int32)
                goldens[f"{name}/{side}/stage{stage}"] = samples(stage, values)
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **goldens)
    print(GOLDENS, GOLDENS.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
