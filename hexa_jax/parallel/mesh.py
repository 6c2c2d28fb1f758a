"""The device mesh, and how a batch [M microbatches, rows, ...] lies on it.

Rows are split over the one mesh axis, "data".
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hexa_jax.models.norm import NormMode

ROWS = P(None, "data")


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Return a mesh with one axis over the given devices; None: all devices of all hosts."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of a step are divided, checked once at the start.

    Attributes:
        batch_size: B, examples of a step on all devices.
        microbatches: M, sequential parts of a step.
        num_devices: devices of the mesh.
        bn_group_size: consecutive rows that share BatchNorm statistics.
        cutmix_block: consecutive rows among which partners are drawn; 0 if no view mixes or
            replaces rows.
        shuffle_block: consecutive rows among which MoCo's keys are shuffled; 0 without keys.
    """

    batch_size: int
    microbatches: int
    num_devices: int
    bn_group_size: int
    cutmix_block: int
    shuffle_block: int = 0

    @property
    def rows(self) -> int:
        """Number of rows of one microbatch on one device."""
        return self.batch_size // (self.microbatches * self.num_devices)

    @property
    def unit(self) -> int:
        """Number of consecutive rows of which a view may replace a share.

        It divides each BatchNorm group and each block of partners.
        """
        return math.gcd(self.bn_group_size, self.cutmix_block)

    def check(self) -> None:
        """Check that the sizes fit each other.

        Raises:
            ValueError: they do not; one line with numbers that would.
        """
        if self.microbatches < 1:
            raise ValueError(f"runtime.microbatches must be at least 1, not {self.microbatches}")
        if self.batch_size % (self.microbatches * self.num_devices):
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by {self.num_devices} devices x "
                f"{self.microbatches} microbatches: use "
                f"{_nearest(self.batch_size, self._batch_sizes())}"
            )
        micro = self.batch_size // self.microbatches
        if not self._group_fits(self.bn_group_size):
            whole = [size for size in range(1, micro + 1) if self._group_fits(size)]
            raise ValueError(
                f"bn_group_size={self.bn_group_size} does not fit {self.rows} rows a device and "
                "microbatch "
                f"({micro} rows a microbatch): use {_nearest(self.bn_group_size, whole)}, or other "
                "runtime.microbatches"
            )
        blocks = [c for c in range(1, self.rows + 1) if self.rows % c == 0]
        if self.cutmix_block and self.cutmix_block not in blocks:
            raise ValueError(
                f"cutmix_block={self.cutmix_block} does not divide the {self.rows} rows a device "
                "and microbatch: "
                f"use {_nearest(self.cutmix_block, blocks)}, or other runtime.microbatches or "
                "runtime.num_devices "
                "(partners come from the same device and microbatch)"
            )
        if self.shuffle_block and self.batch_size % self.shuffle_block:
            sizes = [s for s in range(1, self.batch_size + 1) if self.batch_size % s == 0]
            raise ValueError(
                f"shuffle_block={self.shuffle_block} does not divide batch_size={self.batch_size}: "
                f"use {_nearest(self.shuffle_block, sizes)}"
            )

    def _group_fits(self, size: int) -> bool:
        """Return whether whole BatchNorm groups fill a device, or whole devices a group."""
        micro = self.batch_size // self.microbatches
        return size > 0 and micro % size == 0 and (self.rows % size == 0 or size % self.rows == 0)

    def _batch_sizes(self) -> list[int]:
        """Return batch sizes that divide evenly, preferring those that suit groups and blocks."""
        parts = self.microbatches * self.num_devices
        sizes = range(parts, 4 * self.batch_size + 2 * parts, parts)

        def suits(size: int) -> bool:
            other = dataclasses.replace(self, batch_size=size)
            blocks = (other.rows, self.cutmix_block or 1), (size, self.shuffle_block or 1)
            return other._group_fits(self.bn_group_size) and all(
                block > 0 and rows % block == 0 for rows, block in blocks
            )

        return [size for size in sizes if suits(size)] or list(sizes)

    def norm_mode(self, branch: str) -> NormMode:
        """Return how a training pass normalizes: in whole local groups, or across devices."""
        if self.rows % self.bn_group_size == 0:
            return NormMode(branch, groups=self.rows // self.bn_group_size)
        span = self.bn_group_size // self.rows
        groups = np.arange(self.num_devices).reshape(-1, span)
        return NormMode(branch, 1, "data", tuple(tuple(int(d) for d in group) for group in groups))


def _nearest(wanted: int, sizes: list[int]) -> str:
    below = [s for s in sizes if s < wanted][-1:]
    above = [s for s in sizes if s > wanted][:1]
    return " or ".join(str(size) for size in below + above)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch's leaves [M, n, ...]."""
    return NamedSharding(mesh, ROWS)


def local_rows(mesh: Mesh, layout: Layout) -> np.ndarray:
    """Return the numbers int [M, local] of the rows that this process reads, for `shard_batch`."""
    shape = (layout.microbatches, layout.batch_size // layout.microbatches)
    columns: set[int] = set()
    for slices in row_sharding(mesh).addressable_devices_indices_map(shape).values():
        columns.update(range(*slices[1].indices(shape[1])))
    return np.arange(layout.batch_size).reshape(shape)[:, sorted(columns)]


def shard_batch(mesh: Mesh, layout: Layout, leaf: np.ndarray) -> jax.Array:
    """Put this process's rows [M, local, ...] into the global array [M, B / M, ...]."""
    shape = (layout.microbatches, layout.batch_size // layout.microbatches, *leaf.shape[2:])
    return jax.make_array_from_process_local_data(row_sharding(mesh), leaf, shape)
