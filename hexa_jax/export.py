"""Write a pre-trained backbone for other libraries.

Command line: `python -m hexa_jax.export --checkpoint=WORKDIR --format=FORMAT --output=PATH`

--checkpoint  workdir of a pre-training run, or a weights file (.safetensors, .npz; .pth and the like need torch); gs:// too;
              or another library's weights: timm:NAME, torchvision:NAME, hf:REPO
--format      torchvision   a .safetensors file, or a .pth one (needs torch), with torchvision's names
              timm          a folder with model.safetensors and config.json for timm.create_model
              huggingface   a folder that transformers.AutoModel loads
              detectron2    a .pkl file for MODEL.WEIGHTS
              stablehlo     a .stablehlo file: JAX's program for cpu, cuda and tpu, with the weights inside
              onnx          a .onnx file for ONNX Runtime and others (needs onnx: pip install onnx onnxruntime)
--output      the file or folder
--input       of stablehlo and onnx: uint8 (the default), or float32 with pixels in [0, 1]

A stablehlo or onnx file takes images [N, H, W, 3] in RGB, any number of them, as a decoder gives
them: normalization is inside. It returns pooled features, float32 [N, F]. H and W are those of the
run's own evaluation in a stablehlo file, and free in an onnx file.

The clean BatchNorm set is written; heads and classifiers are not.
"""

import json
import pathlib
import pickle
import sys
from typing import Any

import jax
import jax.export
import numpy as np

from hexa_jax.checkpoint.checkpointer import CheckpointError
from hexa_jax.core.arguments import Parser
from hexa_jax.core.console import with_aliases
from hexa_jax.evals.backbone import Backbone, load_backbone
from hexa_jax.evals.image_size import trained_size
from hexa_jax.models.onnx_graph import INPUTS, to_onnx
from hexa_jax.models.weights import (
    Architecture,
    WeightsError,
    architecture_of,
    huggingface_config,
    to_detectron2,
    to_huggingface,
    to_torchvision,
)
from hexa_jax.storage.gcs import RemoteError

FORMATS = ("torchvision", "timm", "huggingface", "detectron2", "stablehlo", "onnx")
PLATFORMS = ("cpu", "cuda", "tpu")  # that one stablehlo file runs on


def export(backbone: Backbone, form: str, output: pathlib.Path, dtype: str = "uint8") -> None:
    """Write a backbone.

    Args:
        backbone: from `load_backbone`.
        form: one of FORMATS.
        output: file or folder, made anew.
        dtype: of the images that a stablehlo or onnx file takes: "uint8", or "float32" for pixels
            in [0, 1].

    Raises:
        WeightsError: the format cannot hold this network, or needs a library that is missing.
    """
    arrays = to_torchvision(backbone.variables)
    architecture = architecture_of(arrays)._replace(stem=backbone.network.backbone.stem)
    writers = {
        "torchvision": _torchvision,
        "timm": _timm,
        "huggingface": _huggingface,
        "detectron2": _detectron2,
    }
    if form not in FORMATS:
        raise WeightsError(f"--format={form} is not known: use one of {', '.join(FORMATS)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    resize, crop = trained_size(backbone.config)
    pixels = {
        "mean": list(backbone.network.pixel_mean),
        "std": list(backbone.network.pixel_std),
        "crop": crop,
        "crop_pct": _crop_pct(resize, crop),
    }
    if form == "stablehlo":
        _stablehlo(backbone, crop, output, dtype)
    elif form == "onnx":
        about = pixels | {
            "architecture": architecture.name,
            "stem": architecture.stem,
            "input": dtype,
        }
        _onnx(arrays, architecture, about, output, dtype)
    else:
        writers[form](arrays, architecture, pixels, output)


def _crop_pct(resize: int, crop: int) -> float:
    """Return the ratio from which both libraries get the short side as int(crop / ratio)."""
    ratio = crop / resize
    return ratio if int(crop / ratio) == resize else float(np.nextafter(ratio, 0))


def _torchvision(
    arrays: dict[str, np.ndarray], architecture: Architecture, pixels: dict, output: pathlib.Path
) -> None:
    if output.suffix == ".safetensors":
        _safetensors(
            arrays,
            output,
            {"architecture": architecture.name, "stem": architecture.stem}
            | {k: json.dumps(pixels[k]) for k in ("mean", "std")},
        )
        return
    if output.suffix not in (".pth", ".pt"):
        raise WeightsError(f"--output={output} must end in .safetensors or .pth")
    try:
        import torch
    except ImportError:
        raise WeightsError(
            "writing .pth needs torch: pip install torch, or use .safetensors"
        ) from None
    try:
        torch.save(
            {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}, output
        )
    except RuntimeError as error:  # what torch makes of an OSError
        raise WeightsError(f"{output} cannot be written: {error}") from None


def _timm(
    arrays: dict[str, np.ndarray], architecture: Architecture, pixels: dict, output: pathlib.Path
) -> None:
    if (
        architecture.stem != "imagenet"
        or architecture.base_channels != 64
        or architecture.depth == 10
    ):
        raise WeightsError(
            "timm's ResNets have a 7x7 stem and the standard width: this network has another"
        )
    output.mkdir(exist_ok=True)
    _safetensors(arrays, output / "model.safetensors", {"format": "pt"})
    config = {
        "architecture": f"resnet{architecture.depth}",
        "num_classes": 0,
        "pretrained_cfg": {
            "mean": pixels["mean"],
            "std": pixels["std"],
            "num_classes": 0,
            "input_size": [3, pixels["crop"], pixels["crop"]],
            "crop_pct": pixels["crop_pct"],
            "interpolation": "bilinear",
        },
    }
    (output / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _huggingface(
    arrays: dict[str, np.ndarray], architecture: Architecture, pixels: dict, output: pathlib.Path
) -> None:
    config = huggingface_config(architecture)
    output.mkdir(exist_ok=True)
    _safetensors(to_huggingface(arrays), output / "model.safetensors", {"format": "pt"})
    (output / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": pixels["crop"]},
        "crop_pct": pixels["crop_pct"],
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": pixels["mean"],
        "image_std": pixels["std"],
    }
    (output / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")


def _detectron2(
    arrays: dict[str, np.ndarray], architecture: Architecture, pixels: dict, output: pathlib.Path
) -> None:
    if output.suffix != ".pkl":
        raise WeightsError(f"--output={output} must end in .pkl")
    if architecture.stem != "imagenet":
        raise WeightsError(
            f"detectron2's ResNet has a 7x7 stem: a network with stem={architecture.stem} cannot "
            "be written for it"
        )
    content: dict[str, Any] = {
        "model": to_detectron2(arrays),
        "__author__": "hexa_jax",
        "matching_heuristics": True,
    }
    with output.open("wb") as file:
        pickle.dump(content, file, protocol=2)


def _stablehlo(backbone: Backbone, side: int, output: pathlib.Path, dtype: str) -> None:
    if output.suffix != ".stablehlo":
        raise WeightsError(f"--output={output} must end in .stablehlo")
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, side, side, 3), dtype)

    def features(images: jax.Array) -> jax.Array:
        return backbone.features(backbone.variables, images)

    # Accelerators would otherwise round the factors of products, each in its way: features that
    # were stored on one kind of device would not be those of another.
    with jax.default_matmul_precision("highest"):
        exported = jax.export.export(jax.jit(features), platforms=PLATFORMS)(images)
    output.write_bytes(exported.serialize())


def _onnx(
    arrays: dict[str, np.ndarray],
    architecture: Architecture,
    about: dict,
    output: pathlib.Path,
    dtype: str,
) -> None:
    if output.suffix != ".onnx":
        raise WeightsError(f"--output={output} must end in .onnx")
    model = to_onnx(arrays, architecture, tuple(about["mean"]), tuple(about["std"]), dtype, about)
    try:
        content = model.SerializeToString()
    except ValueError:  # of protobuf
        raise WeightsError(
            "an ONNX file holds at most 2 GiB, this network has more: use --format=stablehlo"
        ) from None
    output.write_bytes(content)


def _safetensors(
    arrays: dict[str, np.ndarray], path: pathlib.Path, metadata: dict[str, str]
) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(arrays, path, metadata)
    except SafetensorError as error:
        raise WeightsError(f"{path} cannot be written: {error}") from None


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    parser = Parser("hexa_jax.export", WeightsError)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--input", choices=INPUTS, default="uint8")
    try:
        words = parser.parse_args(argv)
        export(load_backbone(words.checkpoint), words.format, words.output, words.input)
    except (WeightsError, CheckpointError, RemoteError) as error:
        print(f"hexa_jax.export: {with_aliases(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"hexa_jax.export: {error.filename or 'output'}: {error.strerror or error}",
            file=sys.stderr,
        )
        return 2
    print(words.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
