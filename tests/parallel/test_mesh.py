"""Row arithmetic: which layouts fit, what the messages suggest, and the way of rows to 8 devices."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from hexa_jax.models.norm import ADVERSARIAL, CLEAN
from hexa_jax.parallel.mesh import Layout, local_rows, make_mesh, shard_batch


def layout_of(batch_size, microbatches, num_devices, bn_group_size, cutmix_block, shuffle_block=0):
    return Layout(batch_size, microbatches, num_devices, bn_group_size, cutmix_block, shuffle_block)


def problem(layout):
    """(the setting that the message blames, the numbers that it suggests)."""
    with pytest.raises(ValueError) as caught:
        layout.check()
    message = str(caught.value)
    assert "\n" not in message
    name, value = re.match(r"(\w+)=(\d+) ", message).groups()
    assert getattr(layout, name) == int(value)
    suggested = re.search(r"use (\d+(?: or \d+)?)", message)
    return name, [int(number) for number in suggested[1].split(" or ")] if suggested else []


@pytest.mark.parametrize(
    "layout",
    [
        layout_of(256, 1, 8, 32, 32, 256),
        layout_of(256, 4, 8, 8, 8, 64),
        layout_of(256, 4, 1, 32, 32),
        layout_of(256, 1, 8, 128, 16),  # a group over four devices
        layout_of(256, 2, 8, 128, 16),  # over all eight
        layout_of(24, 1, 2, 3, 4),
        layout_of(1, 1, 1, 1, 1, 1),
    ],
)
def test_layouts_that_fit(layout):
    layout.check()  # raises if it does not
    assert layout.rows * layout.num_devices * layout.microbatches == layout.batch_size


@pytest.mark.parametrize(
    "layout, name, suggested",
    [
        (layout_of(250, 1, 8, 1, 1), "batch_size", [248, 256]),
        (layout_of(250, 4, 8, 1, 1), "batch_size", [224, 256]),
        (layout_of(5, 1, 8, 1, 1), "batch_size", [8]),
        (layout_of(250, 1, 8, 32, 32), "batch_size", [256]),  # 248 would leave 31 rows a device: no group of 32
        (layout_of(1001, 1, 8, 32, 32, 256), "batch_size", [768, 1024]),
        (layout_of(260, 1, 8, 64, 16, 128), "batch_size", [256, 512]),
        (layout_of(256, 1, 8, 48, 32), "bn_group_size", [32, 64]),
        (layout_of(256, 1, 8, 512, 32), "bn_group_size", [256]),
        (layout_of(24, 1, 2, 8, 4), "bn_group_size", [6, 12]),  # 8 divides 24 rows, but not the 12 of a device
        (layout_of(256, 8, 8, 64, 4), "bn_group_size", [32]),  # more than a microbatch
        (layout_of(256, 1, 8, 32, 24), "cutmix_block", [16, 32]),
        (layout_of(256, 1, 8, 32, 64), "cutmix_block", [32]),
        (layout_of(256, 1, 8, 32, 32, 100), "shuffle_block", [64, 128]),
        (layout_of(256, 1, 8, 32, 32, 512), "shuffle_block", [256]),
    ],
)
def test_messages_suggest_numbers_that_work(layout, name, suggested):
    assert problem(layout) == (name, suggested)
    for number in suggested:
        dataclasses.replace(layout, **{name: number}).check()


def test_every_suggestion_passes_the_check():
    """Random layouts: following the messages one by one ends in a layout that fits, and no message repeats itself."""
    generator = np.random.default_rng(0)
    fixed = 0
    for _ in range(400):
        layout = layout_of(
            int(generator.integers(1, 200)),
            int(generator.integers(1, 5)),
            int(generator.choice([1, 2, 3, 4, 8])),
            int(generator.integers(1, 70)),
            int(generator.integers(1, 40)),
            int(generator.integers(0, 70)),
        )
        blamed = []
        while True:
            try:
                layout.check()
                break
            except ValueError:
                name, suggested = problem(layout)
            assert name not in blamed and suggested
            blamed.append(name)
            wanted = getattr(layout, name)
            assert all(number < wanted for number in suggested[:-1]) and len(suggested) <= 2
            layout = dataclasses.replace(layout, **{name: suggested[-1]})
        fixed += bool(blamed)
    assert fixed > 200


@pytest.mark.parametrize("microbatches", [0, -1])
def test_microbatches_must_be_positive(microbatches):
    with pytest.raises(ValueError, match=f"microbatches must be at least 1, not {microbatches}$"):
        layout_of(256, microbatches, 8, 32, 32).check()


def test_norm_mode():
    inside = layout_of(256, 2, 8, 8, 8).norm_mode(ADVERSARIAL)  # 16 rows
    assert (inside.branch, inside.groups, inside.axis_name) == (ADVERSARIAL, 2, None)
    whole = layout_of(256, 2, 8, 16, 8).norm_mode(CLEAN)
    assert (whole.groups, whole.axis_name) == (1, None)
    across = layout_of(256, 2, 8, 64, 8).norm_mode(CLEAN)
    assert (across.branch, across.groups, across.axis_name) == (CLEAN, 1, "data")
    assert across.device_groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layout_of(256, 2, 8, 128, 8).norm_mode(CLEAN).device_groups == (tuple(range(8)),)
    hash(across)  # a static argument


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_rows_reach_their_devices(microbatches, num_devices):
    layout = layout_of(64, microbatches, num_devices, 1, 1)
    mesh = make_mesh(jax.devices()[:num_devices])
    assert mesh.axis_names == ("data",) and mesh.size == num_devices
    rows = local_rows(mesh, layout)
    np.testing.assert_array_equal(rows, np.arange(64).reshape(microbatches, -1))  # one process: all rows in order
    leaf = np.stack([rows, -rows], axis=-1).astype(np.int32)
    placed = shard_batch(mesh, layout, leaf)
    assert placed.shape == (microbatches, 64 // microbatches, 2) and placed.dtype == np.int32
    np.testing.assert_array_equal(placed, leaf)
    n = layout.rows
    assert len(placed.addressable_shards) == num_devices
    for number, device in enumerate(jax.devices()[:num_devices]):
        (shard,) = [shard for shard in placed.addressable_shards if shard.device == device]
        np.testing.assert_array_equal(shard.data, leaf[:, number * n : (number + 1) * n])


def test_make_mesh_takes_all_devices():
    assert make_mesh().size == len(jax.devices()) == 8
