"""`runtime.microbatches = 0`: the fewest microbatches that fit, the same results, one line."""

import dataclasses

import jax
import numpy as np
import pytest
from small import small_config

from hexa_jax.core.errors import ConfigError
from hexa_jax.data.open import open_training_source
from hexa_jax.parallel.mesh import Layout
from hexa_jax.training import fit_memory, memory
from hexa_jax.training.factory import make_trainer
from hexa_jax.training.fit_memory import compile_to_fit, same_results
from hexa_jax.training.memory import Need

GROUPED = {"batch_size": 32, "bn_group_size": 4, "cutmix_block": 4, "runtime.microbatches": 0}


def prepared(precision="float32", **overrides):
    config = small_config("deepcluster", precision=precision, **GROUPED | overrides)
    source = open_training_source(config)
    return config, source, make_trainer(config, len(source), jax.devices()[:1])


def pretend(monkeypatch, room, refused=()):
    """Let a step need 100 bytes and 960 shared by its microbatches; returns the numbers that were compiled."""
    compiled = []

    class Lowered:
        def __init__(self, parts):
            self.parts = parts

        def compile(self):
            compiled.append(self.parts)
            if self.parts in refused:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")
            return self

    monkeypatch.setattr(fit_memory, "MEGABYTE", 1)
    monkeypatch.setattr(fit_memory, "gradient_bytes", lambda trainer: 0)
    monkeypatch.setattr(fit_memory, "available", lambda mesh: room)
    monkeypatch.setattr(memory, "gradient_bytes", lambda trainer: 0)
    monkeypatch.setattr(fit_memory, "lowered", lambda c, trainer, *_: Lowered(trainer.objective.layout.microbatches))
    monkeypatch.setattr(fit_memory, "needed", lambda program, _: Need(100, 960 // program.parts))
    return compiled


def found(config, source, trainer):
    with jax.set_mesh(trainer.mesh):
        fitted, steps = compile_to_fit(config, trainer, source)
    return fitted.objective.layout.microbatches, steps


@pytest.mark.parametrize(
    ("room", "parts", "compiled"),
    [
        (1200, 1, [1]),  # 1060 of 1080
        (1100, 2, [1, 2]),
        (500, 4, [1, 4, 2]),  # 2 needs 580: too near to be told apart without compiling
        (300, 8, [1, 8]),  # and 4 needs 340, more than 1.1 times 270
    ],
)
def test_the_fewest_microbatches_are_found(room, parts, compiled, monkeypatch, capsys):
    config, source, trainer = prepared()
    tried = pretend(monkeypatch, room)
    assert found(config, source, trainer)[0] == parts
    assert tried[0] == 1 and set(tried) <= set(compiled) and parts in tried
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: ")]
    assert ("one microbatch" if parts == 1 else f"{parts} microbatches, the fewest that fit") in line


def test_a_step_that_the_compiler_refuses_is_tried_in_smaller_parts(monkeypatch):
    config, source, trainer = prepared()
    assert pretend(monkeypatch, 1200, refused=(1, 2)) == []
    assert found(config, source, trainer)[0] == 4


def test_a_step_that_never_fits_is_one_line(monkeypatch):
    config, source, trainer = prepared()
    pretend(monkeypatch, 150)
    with pytest.raises(ConfigError, match=r"needs .* and there are .*--config\.batch_size"):
        found(config, source, trainer)


def test_groups_and_blocks_stay_whole():
    layout = Layout(batch_size=32, microbatches=1, num_devices=2, bn_group_size=4, cutmix_block=8)
    allowed = same_results(layout)
    assert [other.microbatches for other in allowed] == [1, 2]
    assert all(dataclasses.replace(other, microbatches=1) == layout for other in allowed)
    assert [other.microbatches for other in same_results(dataclasses.replace(layout, bn_group_size=32))] == [1]


@pytest.mark.slow  # compiles whole steps; tests/parallel/test_parallel.py has the same for given numbers
def test_the_found_number_changes_no_result(monkeypatch):
    """A step that had to be split gives the parameters of the whole one."""
    config, source, trainer = prepared("float64")

    def stepped(room):
        monkeypatch.setattr(fit_memory, "available", lambda mesh: room)
        with jax.set_mesh(trainer.mesh):
            fitted, steps = compile_to_fit(config, trainer, source)
            shapes = fitted.batch_shapes()
            rng = np.random.default_rng(0)

            def rows(leaf):
                if leaf.dtype == np.bool_:
                    return np.ones(leaf.shape, bool)
                high = 255 if leaf.dtype == np.uint8 else 1
                whole = rng.integers(0, high, (config.batch_size, *leaf.shape[2:]))
                return whole.reshape(leaf.shape).astype(leaf.dtype)

            batch = jax.tree.map(lambda leaf: jax.device_put(rows(leaf), leaf.sharding), shapes)
            state, _ = steps.train(steps.init(np.uint32(3)), batch, None)
        return fitted.objective.layout.microbatches, jax.tree.leaves(state.params)

    with jax.enable_x64(True):
        whole, expected = stepped(1 << 40)
        with jax.set_mesh(trainer.mesh):
            steps = trainer.compile()
            total = memory.needed(memory.lowered(config, trainer, steps, source).compile(), "cpu").total
        split, parameters = stepped(int(0.8 * total))
    assert whole == 1 and split > 1
    for one, other in zip(expected, parameters, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
