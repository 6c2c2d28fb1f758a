"""What each experiment trains, at four sizes.

`imagenet` is the paper's protocol, `tiny` runs in minutes on two CPU cores.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from hexa_jax.experiments.sweep import Cell, Entry, Stage
from hexa_jax.training.schemes import SCHEMES

BETAS = ((1, 1), (5, 0.1), (5, 0.5), (5, 1), (5, 2), (5, 3), (5, 4), (5, 5))  # Fig. 5
STRENGTHS = (1, 3)  # Fig. 4, epsilon and eta
PLAIN, HEXA = "std", "std+adv"
CONTROL = "plain"  # the row that others are compared with, in claim


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of the experiments.

    Attributes:
        configs: per method, a config file with arguments; `{epochs}` is filled in.
        fig1, fig2, fig3, fig4, fig5, claim: epochs of pre-training; fig2 per method.
        evaluate_every: fig3, epochs between two points of the curve.
        probe: epochs of the SGD probe in fig2 and fig5, in fig3, in fig4; 0: none, the runs' own
            kNN and linear probe do.
        probe_settings: of the SGD probe, where they differ from ImageNet's.
        six_crops: settings of the multi-crop runs (fig2's and fig5's DeepCluster).
    """

    configs: dict[str, str]
    fig1: int
    fig2: dict[str, int]
    fig3: int
    evaluate_every: int
    fig4: int
    fig5: int
    probe: tuple[int, int, int]
    claim: int = 200
    probe_settings: dict[str, object] = dataclasses.field(default_factory=dict)
    six_crops: dict[str, object] = dataclasses.field(default_factory=dict)


# The paper has 6 crops of 160 and 96 pixels; for smaller images the sides shrink, the scales stay.
def _six_crops(large: int, small: int) -> dict[str, object]:
    return {
        "data.num_crops": (2, 4),
        "data.crop_size": (large, small),
        "data.min_scale": (0.14, 0.05),
        "data.max_scale": (1.0, 0.14),
    }


def _recipes(prefix: str, *methods: str) -> dict[str, str]:
    """Return the config file of each method, whose names begin with `prefix`."""
    files = {"moco": "moco_v2", "deepcluster": "deepcluster_v2", "pcl": "pcl_v2"}
    return {
        method: f"{prefix}{files.get(method, method)}.py:epochs={{epochs}}" for method in methods
    }


_IMAGENETTE = Preset(
    configs=_recipes("imagenette_", "moco", "deepcluster", "simclr", "swav", "rotation"),
    fig1=100,
    fig2={"moco": 50, "deepcluster": 50},
    fig3=200,
    evaluate_every=20,
    fig4=40,
    fig5=20,
    probe=(0, 20, 0),
    probe_settings={"data.crop": 128, "data.resize": 128},
    six_crops=_six_crops(96, 64),
)

_TINY = (
    "moco",
    "deepcluster",
    "simclr",
    "swav",
    "rotation",
    "byol",
    "simsiam",
    "pcl",
    "supervised",
)

PRESETS = {
    "imagenet": Preset(
        configs=_recipes(
            "", *("moco", "simclr", "rotation", "byol", "simsiam", "pcl", "supervised")
        )
        | {
            # The paper does not give the batch of its 6-crop runs; 5 epochs leave no room for the
            # warm-up of B = 4096.
            "deepcluster": "deepcluster_v2.py:batch=256,epochs={epochs}",
            "swav": "swav.py:crops=2,batch=256,epochs={epochs}",
        },
        fig1=200,
        fig2={"moco": 20, "deepcluster": 5},
        fig3=800,
        evaluate_every=200,
        fig4=40,
        fig5=5,
        probe=(1, 100, 100),
        six_crops=_six_crops(160, 96) | {"data.min_scale": (0.08, 0.05)},
    ),
    "imagenette": _IMAGENETTE,
    "cifar10": dataclasses.replace(
        _IMAGENETTE,
        configs=_recipes(
            "cifar10_",
            "moco",
            "deepcluster",
            "simclr",
            "swav",
            "rotation",
            "byol",
            "pcl",
            "supervised",
        ),
        fig1=50,
        probe_settings={"data.crop": 32, "data.resize": 32, "data.min_scale": 0.2},
        six_crops=_six_crops(32, 16),
    ),
    "tiny": Preset(
        configs={method: f"tiny.py:method={method},epochs={{epochs}}" for method in _TINY},
        fig1=2,
        fig2={"moco": 1, "deepcluster": 1},
        fig3=2,
        evaluate_every=1,
        fig4=1,
        fig5=1,
        claim=1,
        probe=(0, 2, 0),
        probe_settings={"data.crop": 16, "data.resize": 16, "batch_size": 32},
        six_crops=_six_crops(16, 8),
    ),
}


def _stages(
    preset: str, method: str, epochs: int, probe: int, settings: dict[str, object]
) -> tuple[Stage, ...]:
    sizes = PRESETS[preset]
    # MoCo is compared with a plain control at HEXA_MoCo's key momentum.
    shared: dict[str, object] = {"moco.momentum": 0.99} if method == "moco" else {}
    train = Stage(sizes.configs[method].format(epochs=epochs), shared | settings)
    if not probe:
        return (train,)
    family = "moco" if method == "moco" else "deepcluster"
    protocol = f"eval/linear_imagenet.py:family={family},epochs={probe}"
    return train, Stage(protocol, sizes.probe_settings, folder="probe", checkpoint=".")


def fig1(preset: str, methods: Sequence[str], seeds: Sequence[int]) -> list[Entry]:
    """One HEXA run with cut-mixed views per method, to look into."""
    epochs = PRESETS[preset].fig1
    entries = []
    for method, seed in itertools.product(methods, seeds[:1]):
        stages = _stages(preset, method, epochs, 0, {"scheme": "std+adv+cmx", "seed": seed})
        entries.append(
            Entry({"method": method, "seed": seed}, Cell(f"{method}-seed{seed}", stages))
        )
    return entries


def fig2(preset: str, methods: Sequence[str], seeds: Sequence[int]) -> list[Entry]:
    """Six schemes of hard examples per method."""
    sizes, entries = PRESETS[preset], []
    for method, scheme, seed in itertools.product(methods, SCHEMES, seeds):
        epochs = sizes.fig2.get(method, sizes.fig2["moco"])
        crops = sizes.six_crops if method == "deepcluster" and preset == "imagenet" else {}
        stages = _stages(
            preset, method, epochs, sizes.probe[0], {**crops, "scheme": scheme, "seed": seed}
        )
        factors = {"method": method, "scheme": scheme, "seed": seed}
        entries.append(Entry(factors, Cell(f"{method}-{scheme}-seed{seed}", stages)))
    return entries


def fig3(preset: str, methods: Sequence[str], seeds: Sequence[int]) -> list[Entry]:
    """Plain and HEXA, with accuracy on the way, and an SGD probe of the last checkpoint."""
    sizes, entries = PRESETS[preset], []
    for method, scheme, seed in itertools.product(methods, (PLAIN, HEXA), seeds):
        settings = {
            "scheme": scheme,
            "seed": seed,
            "knn.every_epochs": sizes.evaluate_every,
            "linear.every_epochs": sizes.evaluate_every,
            "runtime.keep_every": sizes.evaluate_every,
        }
        stages = _stages(preset, method, sizes.fig3, sizes.probe[1], settings)
        factors = {"method": method, "scheme": scheme, "seed": seed}
        entries.append(Entry(factors, Cell(f"{method}-{scheme}-seed{seed}", stages)))
    return entries


def fig4(preset: str, methods: Sequence[str], seeds: Sequence[int]) -> list[Entry]:
    """Attack strengths epsilon x eta.

    One linf step moves by min(epsilon, eta): equal cells are trained once.
    """
    sizes, entries = PRESETS[preset], []
    grid = [(None, None), *itertools.product(STRENGTHS, STRENGTHS)]
    for method, (epsilon, eta), seed in itertools.product(methods, grid, seeds):
        settings: dict[str, object] = {"scheme": PLAIN, "seed": seed}
        name = PLAIN
        if epsilon is not None and eta is not None:
            moved = min(epsilon, eta)
            settings |= {
                "scheme": HEXA,
                "views.epsilon": float(moved),
                "views.step_size": float(moved),
            }
            name = f"moves{moved}"
        stages = _stages(preset, method, sizes.fig4, sizes.probe[2], settings)
        factors = {"method": method, "epsilon": epsilon or "-", "eta": eta or "-", "seed": seed}
        entries.append(Entry(factors, Cell(f"{method}-{name}-seed{seed}", stages)))
    return entries


def fig5(preset: str, methods: Sequence[str], seeds: Sequence[int]) -> list[Entry]:
    """Beta(alpha, beta) of cut-mixed views, six crops for DeepCluster, beside the plain method."""
    sizes, entries = PRESETS[preset], []
    for method, beta, seed in itertools.product(methods, (None, *BETAS), seeds):
        crops = sizes.six_crops if method in ("deepcluster", "swav") else {}
        settings = {**crops, "scheme": PLAIN, "seed": seed}
        name = PLAIN
        if beta is not None:
            settings |= {
                "scheme": "std+cmx",
                "views.cutmix.alpha": float(beta[0]),
                "views.cutmix.beta": float(beta[1]),
            }
            name = f"beta{beta[0]}-{beta[1]}"
        stages = _stages(preset, method, sizes.fig5, sizes.probe[0], settings)
        factors = {
            "method": method,
            "beta": "plain" if beta is None else f"Beta({beta[0]}, {beta[1]})",
            "seed": seed,
        }
        entries.append(Entry(factors, Cell(f"{method}-{name}-seed{seed}", stages)))
    return entries


def claim(preset: str, methods: Sequence[str], seeds: Sequence[int]) -> list[Entry]:
    """Plain and HEXA at equal epochs, compared by the runs' own kNN and linear probe.

    MoCo has two plain runs: with MoCo-v2's key momentum of 0.999, and the control with HEXA_MoCo's.
    """
    entries = []
    for method in methods:
        arms: dict[str, dict[str, object]] = {CONTROL: {"scheme": PLAIN}, HEXA: {"scheme": HEXA}}
        if method == "moco":
            arms = {
                CONTROL: arms[CONTROL],
                "plain, key momentum 0.999": {"scheme": PLAIN, "moco.momentum": 0.999},
                HEXA: arms[HEXA],
            }
        for (arm, settings), seed in itertools.product(arms.items(), seeds):
            whole = {**settings, "seed": seed, "linear.at_end": True}
            stages = _stages(preset, method, PRESETS[preset].claim, 0, whole)
            name = arm.replace(", key momentum ", "-")
            entries.append(
                Entry(
                    {"method": method, "run": arm, "seed": seed},
                    Cell(f"{method}-{name}-seed{seed}", stages),
                )
            )
    return entries


GRIDS = {"fig1": fig1, "fig2": fig2, "fig3": fig3, "fig4": fig4, "fig5": fig5, "claim": claim}
METHODS = {  # of the paper's figures
    "fig1": ("deepcluster",),
    "fig2": ("moco", "deepcluster"),
    "fig3": ("moco", "deepcluster"),
    "fig4": ("deepcluster",),
    "fig5": ("deepcluster",),
    "claim": ("moco", "deepcluster"),
}
