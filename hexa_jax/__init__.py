"""Self-supervised pre-training of image backbones with hard examples (HEXA), in JAX."""

import os
from typing import Any

# Before anything imports epath, which would ask TensorFlow for gs:// wherever that is installed.
os.environ["EPATH_USE_TF"] = "false"

__version__ = "0.1.0"


def load(checkpoint: str) -> tuple[Any, Any]:
    """A pre-trained backbone in one line: `apply, variables = hexa_jax.load("runs/hexa_moco")`.

    Args:
        checkpoint: workdir of a pre-training run, or a weights file (`.safetensors`, `.npz`; `.pth`
            and the like with torch).

    Returns:
        apply(variables, images) -> pooled features float32 [N, F] of images [N, H, W, 3], uint8 or
        float in [0, 1]; jit and differentiate it as you like. And the variables: parameters and
        clean BatchNorm statistics.

    Raises:
        CheckpointError, WeightsError: nothing usable is there; one line says what.
    """
    from hexa_jax.evals.backbone import load_backbone  # JAX is imported when it is needed

    backbone = load_backbone(checkpoint)
    return backbone.features, backbone.variables
