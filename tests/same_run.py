"""When two runs count as the same: settings for runs in several processes, and comparisons of what they leave."""

import numpy as np
from command_line import STEPS, TIMED, environment, final_state, lines

# Two views besides the clean one, two resolutions for DeepCluster; groups and blocks that fit a quarter of the batch.
SETTINGS = {
    "precision": "float64",
    "epochs": 2,
    "bn_group_size": 4,
    "cutmix_block": 4,
    "views.adversarial.weight": 1.0,
    "views.cutmix.weight": 1.0,
    "runtime.num_devices": 0,
    "knn.every_epochs": 1,
    "linear.at_end": False,
}
CROPS = {"data.num_crops": "(2, 2)", "data.crop_size": "(8, 6)", "data.min_scale": "(0.3, 0.1)"}
CROPS |= {"data.max_scale": "(1.0, 0.3)", "augment.blur_probability": "(0.0,)"}
KINDS = {"moco": SETTINGS, "deepcluster": SETTINGS | CROPS}


def devices(count):
    return environment() | {"JAX_NUM_CPU_DEVICES": str(count)}


def what_was_learned(workdir):
    """Leaves of the newest checkpoint, without the bank, whose order is that of the devices."""
    step, state = final_state(workdir)
    return {name: leaf for name, leaf in state.items() if "bank" not in name} | {"step": step}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys() and got["step"] == wanted["step"] > 0
    for name, leaf in wanted.items():
        scale = max(np.abs(leaf).max(initial=0), 1)
        np.testing.assert_allclose(got[name], leaf, atol=1e-9 * scale, rtol=0, err_msg=name)


def check_same_run(workdir, expected):
    """Bitwise the same final state, and the same lines of metrics, each once."""
    step, state = final_state(workdir)
    expected_step, expected_state = final_state(expected)
    assert step == expected_step == STEPS and state.keys() == expected_state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(value, expected_state[name], err_msg=name)

    def comparable(folder):
        return [{name: v for name, v in line.items() if name not in TIMED} for line in lines(folder)]

    assert comparable(workdir) == comparable(expected)
    results = [(folder / "result.json").read_text() for folder in (workdir, expected)]
    assert results[0] == results[1]
