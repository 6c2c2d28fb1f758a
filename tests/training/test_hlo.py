"""What the compiled step sends between devices: no images, no bank, each gradient once."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest
from small import small_config

from hexa_jax.training.factory import make_trainer
from launch.program import CHIPS, collectives, estimated_cycles, microbatches_that_fit, too_large


def compiled(trainer):
    """HLO of the train step and of the refresh, compiled from shapes alone."""
    with jax.set_mesh(trainer.mesh):
        steps = trainer.compile()
        state = trainer.state_shapes()
        train = steps.train.lower(state, trainer.batch_shapes(), None).compile().as_text()
        refresh = steps.refresh.lower(state, jax.ShapeDtypeStruct((), "int32")).compile().as_text()
    return train, refresh


def check_traffic(trainer, train, refresh):
    """Asserts the promises on the step's HLO; returns the gradient reductions' dtypes."""
    config_batch = trainer.spec.batch_size
    found = collectives(train)
    assert found, "a step over several devices must reduce something"
    # Nothing as large as one device's images travels, and no bytes (images arrive as uint8) at all.
    crops = trainer.batch_shapes().crops[0]
    assert all(dtype not in ("u8", "s8") for _, dtype, _, _ in found)
    embeddings = config_batch * trainer.spec.embedding_dim * sum(trainer.spec.num_crops)
    for kind, _, elements, _ in found:
        if kind != "all-reduce":
            assert elements <= embeddings < crops.size // 3, (kind, elements)
    assert not any(in_loop for kind, _, elements, in_loop in found if kind == "all-reduce" and elements > 64)
    # Every gradient exactly once: what is reduced is the parameters, plus BatchNorm moments and a few scalars.
    state = trainer.state_shapes()
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    passes = len(trainer.objective.scheme.views) + 1
    num_moments = passes * sum(leaf.size for leaf in jax.tree.leaves(state.batch_stats["clean_batch_stats"]))
    reduced = [(dtype, elements) for kind, dtype, elements, _ in found if kind == "all-reduce"]
    total = sum(elements for _, elements in reduced)
    # The TPU compiler writes a gather of small embeddings, or its transpose, as a reduction; a live dictionary has both.
    allowed = embeddings * (2 if trainer.objective.method.live_dictionary else 1)
    assert num_params <= total <= num_params + num_moments + allowed + 256, (total, num_params, num_moments)
    # Between epochs: priorities and labels of the bank's rows, and centroids, never the bank itself.
    if hasattr(state.method, "bank"):
        bank = state.method.bank.rows.size
        for kind, _, elements, _ in collectives(refresh):
            assert elements < bank // 4, (kind, elements)
    return {dtype for dtype, elements in reduced if elements > 256}


def traffic_config(method, microbatches, precision="float32"):
    """Groups that fit on a device, so that BatchNorm needs no reduction of its own."""
    return small_config(
        method,
        **{
            "precision": precision,
            "batch_size": 128,
            "shuffle_block": 128,
            "bn_group_size": 4,
            "cutmix_block": 4,
            "moco.queue_size": 256,
            "pcl.queue_size": 256,
            "swav.queue_length": 256,
            "runtime.microbatches": microbatches,
        },
    )


@pytest.mark.parametrize(
    ("method", "microbatches"),
    [("moco", 1), ("deepcluster", 4)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("simclr", 4), ("swav", 1), ("pcl", 4))],
)
def test_only_gradients_and_embeddings_travel(method, microbatches):
    trainer = make_trainer(traffic_config(method, microbatches), 1024, jax.devices())
    assert check_traffic(trainer, *compiled(trainer)) == {"f32"}


def test_the_parser_sees_collectives():
    hlo = """
%body.1 (arg: f32[8]) -> f32[8] {
  %x = f32[1024]{0} all-reduce(%arg), replica_groups={}
}
ENTRY %main (a: u8[2]) -> f32[8] {
  %g = (u8[4,32,32,3]{0}, f32[]) all-gather-start(%a), dimensions={0}
  %w = f32[8] while(%a), condition=%cond.2, body=%body.1
}
"""
    assert collectives(hlo) == [
        ("all-reduce", "f32", 1024, True),
        ("all-gather", "u8", 12288, False),
        ("all-gather", "f32", 1, False),
    ]


def test_a_copy_of_a_collective_is_counted_once():
    hlo = """
%body (p: f32[8]) -> f32[8] {
  %b = f32[8] all-reduce(%p), channel_id=7, to_apply=%add
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %b = f32[8] all-reduce(%a), channel_id=7, to_apply=%add
  %w = f32[8] while(%b), condition=%c, body=%body
  %c = f32[4] all-reduce(%b), channel_id=7, to_apply=%add
  %d = bf16[4] all-reduce(%b), channel_id=8, to_apply=%add
  %e = bf16[4] all-reduce(%b), channel_id=8, to_apply=%add
}
"""
    found = sorted((kind, dtype, elements) for kind, dtype, elements, _ in collectives(hlo))
    assert found == [("all-reduce", "bf16", 4)] * 2 + [("all-reduce", "f32", 4), ("all-reduce", "f32", 8)]


def test_cycles_of_a_loop_count_as_often_as_it_runs():
    hlo = """
%inner (p: f32[8]) -> f32[8] {
  %x = f32[8] fusion(%p), backend_config={"estimated_cycles":"10"}
}
%body (p: f32[8]) -> f32[8] {
  %x = f32[8] fusion(%p), backend_config={"estimated_cycles":"100"}
  %y = f32[8] while(%x), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %x = f32[8] fusion(%a), backend_config={"estimated_cycles":"1000"}
  %y = f32[8] while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"4"}}
}
"""
    assert estimated_cycles(hlo) == 1000 + 4 * (100 + 3 * 10)


def test_what_does_not_fit():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    assert too_large(message) == {"fits": False, "peak_bytes": int(20.5 * 2**30), "limit_bytes": int(15.75 * 2**30)}
    assert too_large("INTERNAL: something else") is None
    # 2 bytes stay and 18 shrink: at 4 microbatches 2 + 18 / 4 = 6.5 of 10, at 2 it is 11.
    assert microbatches_that_fit(1, 20, 2, 10, [1, 2, 4, 8]) == 4
    assert microbatches_that_fit(2, 20, 2, 10, [1, 2, 4, 8]) == 8
    assert microbatches_that_fit(1, 20, 12, 10, [1, 2, 4]) is None
    assert CHIPS["v5e"].memory == 16 * 2**30


TPU_SCRIPT = """
import sys
import jax
from jax.experimental import topologies
from test_hlo import check_traffic, compiled, traffic_config
from hexa_jax.training.factory import make_trainer
method, microbatches = sys.argv[1], int(sys.argv[2])
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
trainer = make_trainer(traffic_config(method, microbatches, "bfloat16"), 1024, list(devices))
print("REDUCED", sorted(check_traffic(trainer, *compiled(trainer))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moco", "deepcluster", "simclr", "swav", "pcl"])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_only_gradients_and_embeddings_travel_on_tpu(method, microbatches):
    """The same promises in the TPU compiler's program, bfloat16 compute: gradients are still reduced in float32."""
    pytest.importorskip("libtpu", reason="needs libtpu: `make test-slow` installs it")
    here = pathlib.Path(__file__).resolve().parent
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [here, here.parent, here.parents[1]])),
    }
    command = [sys.executable, "-c", TPU_SCRIPT, method, str(microbatches)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "REDUCED ['f32']" in done.stdout
