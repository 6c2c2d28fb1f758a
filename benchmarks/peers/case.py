"""One training step in plain numbers, so that an implementation without `hexa_jax` and its configs can do the same work."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """What both sides compute; names and meanings are those of configs/common.py where nothing is said.

    Every BatchNorm group, CutMix block and block of shuffled keys is the whole batch.

    Attributes:
        depth: of the ResNet; `base_channels` includes the width of names such as resnet50w2.
        num_crops: per resolution, without MoCo's key crop.
        temperature: the method's.
        alpha1, alpha2: weights of the adversarial and the cut-mixed loss; 0 leaves the view out.
        epsilon, step_size: in pixels of [0, 1].
        bank_steps: rows of DeepCluster's bank.
        momentum: of SGD; `key_momentum` is that of MoCo's key encoder.
    """

    method: str
    precision: str
    batch_size: int
    depth: int
    base_channels: int
    stem: str
    zero_init_residual: bool
    head_hidden: int
    head_dim: int
    head_batch_norm: bool
    num_crops: tuple[int, ...]
    crop_size: tuple[int, ...]
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    temperature: float
    alpha1: float
    alpha2: float
    epsilon: float
    step_size: float
    steps: int
    attack_norm: str
    cutmix_alpha: float
    cutmix_beta: float
    learning_rate: float
    momentum: float
    weight_decay: float
    key_momentum: float = 0.0
    queue_size: int = 0
    num_clusters: int = 0
    num_heads: int = 0
    assign_crops: int = 0
    bank_steps: int = 0

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Case":
        """The case whose `dataclasses.asdict` went through JSON."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return cls(**values)

    @property
    def crops(self) -> int:
        """V, crops of an image that the network learns from."""
        return sum(self.num_crops)
