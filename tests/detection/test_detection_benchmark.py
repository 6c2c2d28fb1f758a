"""The benchmark of detection: its mistakes; and in miniature a table, and rows that say what was measured, where and how."""

import json
import types

import jax
import jax.numpy as jnp
import pytest
from command_line import REPOSITORY

from benchmarks import detection

SMALL = {
    "random.backbone": "resnet10", "random.base_channels": 8, "model.dim": 16, "model.hidden": 32,
    "model.train_proposals": "(40,30)", "model.test_proposals": "(40,30)", "model.regions": 16,
    "data.canvases": "((32,64),(64,96))", "data.short_sides": "(64,)", "data.eval_short_side": 64,
    "data.long_limit": 96, "data.max_boxes": 10, "runtime.num_devices": 1,
}  # fmt: skip


def words(*options, **settings):
    config = f"--config={REPOSITORY}/configs/eval/detection_voc.py"
    return ["detection.py", config, *options] + [
        f"--config.{name}={value}" for name, value in (SMALL | settings).items()
    ]


@pytest.mark.parametrize(
    "options, settings, expected",
    [
        (["--images=0"], {}, "--images and --repeats must be positive"),
        (["--repeats=0"], {}, "--images and --repeats must be positive"),
        ([], {"precision": "float8"}, "config.precision='float8' is not known"),
        ([], {"model.width": 3}, "unknown config key 'model.width'"),
    ],
)
def test_mistakes_are_one_line(capsys, options, settings, expected):
    assert detection.main(words(*options, **settings)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("detection: ") and expected in line


def test_memory_counts_a_donated_argument_once():
    """1000 floats in; 1000 out in their place, or besides them."""
    x = jnp.zeros(1000, jnp.float32)
    kept, donated = (jax.jit(lambda x: x + 1, donate_argnums=n).lower(x).compile() for n in ((), (0,)))
    assert detection.peak_bytes(kept) - detection.peak_bytes(donated) == 4000
    assert 4000 <= detection.peak_bytes(donated) < 5000
    assert detection.peak_bytes(types.SimpleNamespace(memory_analysis=lambda: None)) == 0


@pytest.mark.slow  # four programs
def test_a_miniature(tmp_path, capsys):
    rows_file = tmp_path / "rows.jsonl"
    command = words("--images=1,2", "--repeats=3", f"--rows={rows_file}")
    assert detection.main(command) == 0
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    cases = [(kind, count) for kind in ("training", "inference") for count in (1, 2)]
    assert [(row["case"], row["images_per_device"]) for row in rows] == cases
    for row in rows:
        assert len(row["seconds"]) == 3
        median = sorted(row["seconds"])[1]
        assert row["images_per_second"] == pytest.approx(row["images_per_device"] / median)
        assert row["device"].startswith("1 x ") and row["command"] == " ".join(command)
        assert {"host", "jax", "jaxlib", "python", "date"} <= row.keys()
    memory = {(row["case"], row["images_per_device"]): row["program_bytes"] for row in rows}
    pixels = 64 * 96 * 3  # of the larger canvas, uint8
    assert memory["training", 2] > memory["training", 1] + pixels
    assert memory["inference", 2] > memory["inference", 1] + pixels
    assert memory["training", 1] > memory["inference", 1]  # momentum, and maps that the backward pass needs
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in table[2:6]] == [[kind, str(count)] for kind, count in cases]
