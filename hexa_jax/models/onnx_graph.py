"""A backbone as an ONNX model: pixels in, pooled features out, normalization inside.

The graph is written layer by layer from the arrays instead of being translated from JAX's program.
So it is NCHW with the operators that other runtimes know best (Conv, BatchNormalization, MaxPool),
names are torchvision's, and batch, height and width stay free.
"""

import json
from typing import Any

import numpy as np

from hexa_jax.models.norm import EPSILON
from hexa_jax.models.resnet import STAGES
from hexa_jax.models.weights import Architecture, Arrays, WeightsError

OPSET, IR_VERSION = 17, 8
INPUTS = ("uint8", "float32")


def to_onnx(
    arrays: Arrays,
    architecture: Architecture,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: str = "uint8",
    about: dict[str, Any] | None = None,
) -> Any:
    """Return an `onnx.ModelProto`: "images" [N, H, W, 3] -> "features" float32 [N, F].

    Args:
        arrays: torchvision's names, without a prefix; what is no part of the backbone is left out.
        architecture: of the arrays, with the stem that they were trained with.
        mean: of the pixels in [0, 1], per channel.
        std: standard deviation of the same.
        dtype: of the images: "uint8", or "float32" for pixels in [0, 1].
        about: JSON values to keep in the model's metadata.

    Raises:
        WeightsError: onnx is missing.
    """
    graph = _Graph(arrays)
    pixels = "images"
    if dtype == "uint8":
        pixels = graph.add("Cast", [pixels], "pixels.float", to=graph.onnx.TensorProto.FLOAT)
        pixels = graph.add("Div", [pixels, graph.constant("pixels.levels", 255)], "pixels.unit")
    pixels = graph.add("Sub", [pixels, graph.constant("pixels.mean", mean)], "pixels.centred")
    pixels = graph.add("Div", [pixels, graph.constant("pixels.std", std)], "pixels.normalized")
    x = graph.add("Transpose", [pixels], "pixels.nchw", perm=(0, 3, 1, 2))
    x = graph.conv(x, "conv1", stride=1 if architecture.stem == "cifar" else 2)
    x = graph.relu(graph.batch_norm(x, "bn1"))
    if architecture.stem == "imagenet":
        x = graph.add(
            "MaxPool", [x], "maxpool", kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1)
        )
    for stage, blocks in enumerate(STAGES[architecture.depth], start=1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            x = graph.block(x, f"layer{stage}.{block}", stride, bottleneck=architecture.depth >= 50)
    features = graph.add("Flatten", [graph.add("GlobalAveragePool", [x], "avgpool")], "features")
    channels = architecture.base_channels * 8 * (4 if architecture.depth >= 50 else 1)
    return graph.model(dtype, features, channels, about or {})


class _Graph:
    """Nodes and constants as they are added; every method returns the name of its output."""

    def __init__(self, arrays: Arrays):
        try:
            import onnx
        except ImportError:
            raise WeightsError("--format=onnx needs onnx: pip install onnx onnxruntime") from None
        self.onnx, self.arrays = onnx, arrays
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(
            self.onnx.helper.make_node(operator, inputs, [output], name=output, **attributes)
        )
        return output

    def constant(self, name: str, value: Any) -> str:
        self.constants[name] = self.onnx.numpy_helper.from_array(
            np.asarray(value, np.float32), name
        )
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self.arrays[name])

    def conv(self, x: str, name: str, stride: int) -> str:
        size = self.arrays[f"{name}.weight"].shape[-1]
        pads = (size // 2,) * 4
        weight = self.weight(f"{name}.weight")
        return self.add(
            "Conv",
            [x, weight],
            name,
            kernel_shape=(size, size),
            strides=(stride, stride),
            pads=pads,
        )

    def batch_norm(self, x: str, name: str) -> str:
        weights = [
            self.weight(f"{name}.{leaf}")
            for leaf in ("weight", "bias", "running_mean", "running_var")
        ]
        return self.add("BatchNormalization", [x, *weights], name, epsilon=EPSILON)

    def relu(self, x: str) -> str:
        return self.add("Relu", [x], f"{x}.relu")

    def block(self, x: str, name: str, stride: int, bottleneck: bool) -> str:
        """A residual block; the middle 3x3 convolution has the stride, or the first of two."""
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        y = x
        for i, own in enumerate(strides, start=1):
            y = self.batch_norm(self.conv(y, f"{name}.conv{i}", own), f"{name}.bn{i}")
            y = self.relu(y) if i < len(strides) else y
        if f"{name}.downsample.0.weight" in self.arrays:
            x = self.batch_norm(
                self.conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1"
            )
        return self.relu(self.add("Add", [x, y], f"{name}.sum"))

    def model(self, dtype: str, features: str, channels: int, about: dict[str, Any]) -> Any:
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        images = helper.make_tensor_value_info(
            "images",
            getattr(kinds, {"float32": "FLOAT"}.get(dtype, "UINT8")),
            ["batch", "height", "width", 3],
        )
        output = helper.make_tensor_value_info(features, kinds.FLOAT, ["batch", channels])
        graph = helper.make_graph(
            self.nodes, "backbone", [images], [output], list(self.constants.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="hexa_jax",
        )
        helper.set_model_props(model, {name: json.dumps(value) for name, value in about.items()})
        return model
