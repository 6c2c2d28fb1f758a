"""The benchmark of single operations: both sides compute the same thing, and a row comes out for each."""

import json

import jax
import numpy as np
import pytest

from benchmarks import operations

torch = pytest.importorskip("torch", reason="compares with PyTorch")
PAIRS = operations.pairs(2)


@pytest.mark.parametrize("pair", PAIRS, ids=[f"{name} {number}" for number, (name, *_) in enumerate(PAIRS)])
def test_both_sides_compute_the_same(pair):
    _, shape, ours, theirs = pair
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    tensor = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    expected = theirs(tensor)
    found, backward = jax.vjp(jax.jit(ours), x)
    dy = np.random.default_rng(1).normal(size=found.shape).astype(np.float32)
    expected.backward(torch.from_numpy(dy).permute(0, 3, 1, 2))
    np.testing.assert_allclose(found, expected.detach().permute(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(backward(dy)[0], tensor.grad.permute(0, 2, 3, 1), atol=1e-4)


def test_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(operations, "pairs", lambda images: PAIRS[1:2])
    monkeypatch.setattr(operations, "PAUSE", 0.0)
    assert operations.main(["operations", "--repeats=2", f"--rows={tmp_path / 'rows.json'}"]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["operation"] == PAIRS[1][0] and row["operation"] in capsys.readouterr().out
    assert sorted(row["milliseconds"]) == ["ours", "ours, both", "torch", "torch, both"]
    assert min(row["milliseconds"].values()) > 0


def test_without_torch_one_line(capsys, monkeypatch):
    def missing(images):
        raise ImportError("no torch")

    monkeypatch.setattr(operations, "pairs", missing)
    assert operations.main(["operations"]) == 2
    assert "pip install torch" in capsys.readouterr().err
