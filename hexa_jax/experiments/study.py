"""Do hard examples help? A study with controls; seeds for screening and for confirmation.

A base is a plain run; an arm is that run with hard views. Each arm brings its controls:

    EE  equal epochs   the plain run itself
    EP  equal passes   the plain run with a second clean view
    EC  equal compute  the plain run with as many more steps as the arm costs, in whole epochs
    RN  noise          for attacks: random signs of the attack's size, by the same schedule

A run that serves several arms is one cell. Costs are declared in passes as long as one forward
pass: a training pass is three (backwards two: inputs and weights), making an attack two (nothing
for the weights), MoCo's key one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from hexa_jax.experiments.sweep import Cell, Entry, GridError, Stage

Settings = Mapping[str, Any]

SEEDS = {"screen": tuple(range(3)), "confirm": tuple(range(10, 18))}
STAGES = tuple(SEEDS)
# the primary one: declared before the first run, the only one that verdicts rest on
METRIC = "knn_accuracy"
SECONDARY = "linear_accuracy"
TRAINING, ATTACK, KEY = 3, 2, 1  # forward-sized passes of one crop


@dataclasses.dataclass(frozen=True)
class Arm:
    """Hard views on top of a base.

    Attributes:
        name: within its base.
        settings: what it changes.
        passes: forward-sized passes that it adds for each crop that is learned from.
        start: epoch (from 0) from which on it costs them.
        noise: settings of the noise of its attack's size; None where nothing is attacked.
    """

    name: str
    settings: Settings
    passes: int = TRAINING
    start: int = 0
    noise: Settings | None = None


@dataclasses.dataclass(frozen=True)
class Base:
    """A plain run and the arms that are compared with it.

    Attributes:
        name: unique in its part.
        method: see configs/.
        settings: what it changes of the common setting.
        arms: see above.
    """

    name: str
    method: str
    settings: Settings
    arms: tuple[Arm, ...]

    @property
    def crops(self) -> int:
        """Crops of an image that are learned from."""
        return 1 if self.method == "moco" else 2

    @property
    def passes(self) -> int:
        """Forward-sized passes of the plain run for one image."""
        return TRAINING * self.crops + (KEY if self.method == "moco" else 0)


@dataclasses.dataclass(frozen=True)
class Size:
    """Images and epochs of a part."""

    images: int
    epochs: int


@dataclasses.dataclass(frozen=True)
class Preset:
    """How large a study is.

    Attributes:
        config: config file with its arguments; `{method}`, `{epochs}` and `{recipe}` are filled in.
        settings: of all runs.
        by_method: of the runs of a method.
        data: training and held-out source, where the command gives none.
        sizes: per part.
        seeds: per stage.
        whole: False: the first arm of the first base alone.
    """

    config: str
    settings: Settings
    by_method: Mapping[str, Settings]
    data: tuple[str, str]
    sizes: Mapping[str, Size]
    seeds: Mapping[str, tuple[int, ...]]
    whole: bool = True


@dataclasses.dataclass(frozen=True)
class Run:
    """What one row of the grid trains, for every seed of a stage.

    Attributes:
        label: within its base.
        settings: all that differ from the config file but the seed.
        config: the config file with its arguments.
        name: of its cells, without the seed.
    """

    label: str
    settings: Settings
    config: str
    name: str


@dataclasses.dataclass(frozen=True)
class Trial:
    """An arm with its controls; names of runs.

    Attributes:
        name: BASE-ARM, as --arms takes it.
        arm, plain, extra, longer, noise: names of the arm's run and of the controls EE, EP, EC and
            RN; None: no noise.
    """

    name: str
    arm: str
    plain: str
    extra: str
    longer: str
    noise: str | None


# ---- Parts ---------------------------------------------------------------------------------------


def _attack(
    name: str, level: float, own: Settings = MappingProxyType({}), *, start: int = 0, ramp: int = 0
) -> Arm:
    """An attack of `level` grey levels; `own` are settings that its noise does not share."""
    size = {"views.epsilon": level, "views.step_size": level}

    def block(view: str) -> dict[str, Any]:
        schedule = {"start_epoch": float(start), "ramp_epochs": float(ramp)}
        return {f"views.{view}.{key}": value for key, value in schedule.items() if value}

    return Arm(
        name,
        {"scheme": "std+adv", **size, **block("adversarial"), **own},
        passes=TRAINING + ATTACK,
        start=start,
        noise={"scheme": "std+noise", **size, **block("noise")},
    )


CUTMIX, MIXUP = Arm("cmx", {"scheme": "std+cmx"}), Arm("mixup", {"scheme": "std+mixup"})

_NO_COLOR = {"augment.jitter_probability": (0.0,), "augment.gray_probability": (0.0,)}
_DOSES: dict[str, Settings] = {  # of augmentation; images are mirrored in all
    "flip": {**_NO_COLOR, "data.min_scale": (1.0,)},
    "crop50": {**_NO_COLOR, "data.min_scale": (0.5,)},
    "crop20": {**_NO_COLOR, "data.min_scale": (0.2,)},
    "full": {"data.min_scale": (0.2,)},
}
_DOSE_ARMS = (CUTMIX, MIXUP, _attack("adv1", 1.0), _attack("adv4", 4.0))
_SCHEDULES = (
    _attack("adv1", 1.0),
    _attack("adv1-from1", 1.0, start=1),
    _attack("adv1-ramped", 1.0, start=1, ramp=5),
    # At most this rise of a crop's loss, to first order: what one grey level does after the first
    # fifty steps.
    _attack("adv1-adaptive", 1.0, {"views.max_increase": 0.05}),
    _attack("adv1-own_crop", 1.0, {"views.adversarial.target": "own_crop"}, start=1),
)

PARTS: dict[str, tuple[Base, ...]] = {
    "dose": tuple(
        Base(f"{method}-{dose}", method, settings, _DOSE_ARMS)
        for method in ("moco", "deepcluster")
        for dose, settings in _DOSES.items()
    ),
    "clusters": tuple(Base(method, method, {}, (CUTMIX,)) for method in ("deepcluster", "swav")),
    "small_data": tuple(
        Base(method, method, {}, (CUTMIX, MIXUP)) for method in ("moco", "deepcluster")
    ),
    "schedule": (Base("moco", "moco", {}, _SCHEDULES),),
    "largest": tuple(
        Base(method, method, {}, (CUTMIX, MIXUP, _attack("adv1-from1", 1.0, start=1)))
        for method in ("moco", "deepcluster")
    ),
}

_BASE_SIZE = Size(images=12_800, epochs=15)  # 1,500 steps
PRESETS = {
    "cifar10": Preset(
        config="cifar10_{recipe}.py:epochs={epochs}",
        settings={
            "model.backbone": "resnet10",
            "model.base_channels": 16,
            "model.stem": "small",
            "batch_size": 128,
            "optimizer.name": "adam",
            "optimizer.learning_rate": 1e-3,
            "optimizer.schedule": "cosine",
            "optimizer.final_learning_rate": 0.0,
            "optimizer.weight_decay": 1e-6,
            "data.min_scale": (0.2,),
            "views.average": True,
            "eval_statistics": "reestimated",
            "knn.every_epochs": 0,
            "knn.neighbours": 200,
            "knn.pixels": False,
            "linear.at_end": True,
        },
        by_method={
            "moco": {"bn_group_size": 32, "shuffle_block": 128},
            "deepcluster": {"bn_group_size": 128, "deepcluster.num_clusters": 100},
            "swav": {"bn_group_size": 128, "swav.num_prototypes": 100},
        },
        data=("tfds:cifar10:train", "tfds:cifar10:test"),
        sizes={
            "dose": _BASE_SIZE,
            "clusters": _BASE_SIZE,
            "small_data": Size(images=2_560, epochs=600),
            "schedule": _BASE_SIZE,
            "largest": Size(images=50_000, epochs=60),
        },
        seeds=SEEDS,
    ),
    "tiny": Preset(
        config="tiny.py:method={method},scheme=std,epochs={epochs}",
        settings={
            "knn.every_epochs": 0,
            "knn.pixels": False,
            "views.average": True,
            "eval_statistics": "reestimated",
        },
        by_method={"moco": {}, "deepcluster": {}, "swav": {}},
        data=("shapes:train", "shapes:test"),
        sizes=dict.fromkeys(PARTS, Size(images=64, epochs=2)),
        seeds={"screen": SEEDS["screen"][:1], "confirm": SEEDS["confirm"][:2]},
        whole=False,
    ),
}


# ---- From a part to a grid -----------------------------------------------------------------------


def cost(base: Base, epochs: int, added: int = 0, start: int = 0) -> int:
    """Forward-sized passes over one image in `epochs`.

    Args:
        base: the plain run.
        epochs: how many.
        added: passes that a view adds for each crop that is learned from.
        start: epoch (from 0) from which on it adds them.
    """
    return epochs * base.passes + max(0, epochs - start) * base.crops * added


def longer_epochs(base: Base, arm: Arm, epochs: int) -> int:
    """Epochs of the plain run that cost as much as the arm's `epochs`, rounded up."""
    return -(-cost(base, epochs, arm.passes, arm.start) // base.passes)


@dataclasses.dataclass(frozen=True)
class Study:
    """One part at one size on some data.

    Attributes:
        part: name in PARTS.
        preset: name in PRESETS.
        data: training and held-out source; None: the preset's own.
    """

    part: str
    preset: str
    data: tuple[str, str] | None = None

    @property
    def bases(self) -> tuple[Base, ...]:
        """The part's, or their beginning in a preset that is not whole."""
        bases = PARTS[self.part]
        if PRESETS[self.preset].whole:
            return bases
        return (dataclasses.replace(bases[0], arms=bases[0].arms[:1]),)

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of all arms."""
        return tuple(f"{base.name}-{arm.name}" for base in self.bases for arm in base.arms)

    def seeds(self, stage: str) -> tuple[int, ...]:
        """Seeds of a stage; no seed belongs to two."""
        return PRESETS[self.preset].seeds[stage]

    def plan(self, chosen: Sequence[str] | None = None) -> tuple[dict[str, Run], tuple[Trial, ...]]:
        """The runs by name, controls before arms, and the trials made of them.

        Args:
            chosen: names of arms; None: all.

        Raises:
            GridError: no arm has such a name, or one is named twice.
        """
        if chosen is not None:
            unknown = [name for name in chosen if name not in self.arms]
            if unknown or not chosen:
                named = f"unknown arm {unknown[0]!r}" if unknown else "--arms is empty"
                raise GridError(f"{named}: {self.part} has {', '.join(self.arms)}")
            if len(set(chosen)) < len(chosen):
                raise GridError(f"--arms={','.join(chosen)} names an arm twice")
        runs: dict[str, Run] = {}
        trials = []
        for base in self.bases:
            for arm in base.arms:
                name = f"{base.name}-{arm.name}"
                if chosen is None or name in chosen:
                    trial, needed = self._trial(base, arm, name)
                    trials.append(trial)
                    runs |= {run.name: run for run in needed}
        return runs, tuple(trials)

    def _trial(self, base: Base, arm: Arm, name: str) -> tuple[Trial, list[Run]]:
        epochs = PRESETS[self.preset].sizes[self.part].epochs
        longer = longer_epochs(base, arm, epochs)
        plain = self._run(base, "std", {"scheme": "std"}, epochs)
        extra = self._run(base, "extra", {"scheme": "std+extra"}, epochs)
        equal = self._run(base, f"std-{longer}epochs", {"scheme": "std"}, longer)
        noise = None
        if arm.noise is not None:
            noise = self._run(base, _noise_label(arm.noise), arm.noise, epochs)
        run = self._run(base, arm.name, arm.settings, epochs)
        runs = [plain, extra, equal, *filter(None, [noise]), run]
        return Trial(
            name, run.name, plain.name, extra.name, equal.name, noise.name if noise else None
        ), runs

    def _run(self, base: Base, label: str, settings: Settings, epochs: int) -> Run:
        preset = PRESETS[self.preset]
        recipe = {"moco": "moco_v2", "deepcluster": "deepcluster_v2"}.get(base.method, base.method)
        source, eval_source = self.data or preset.data
        data = {
            "data.source": source,
            "data.eval_source": eval_source,
            "data.limit": preset.sizes[self.part].images,
        }
        whole = {
            **preset.settings,
            **preset.by_method[base.method],
            **data,
            **base.settings,
            **settings,
        }
        config = preset.config.format(method=base.method, recipe=recipe, epochs=epochs)
        return Run(label, whole, config, f"{base.name}-{label}")

    def entries(self, stage: str, runs: Mapping[str, Run]) -> list[Entry]:
        """The grid, seed by seed: a night that ends early leaves whole pairs of all arms."""
        return [
            Entry({"run": run.name, "seed": seed}, _cell(run, seed))
            for seed in self.seeds(stage)
            for run in runs.values()
        ]

    def declaration(
        self, stage: str, runs: Mapping[str, Run], trials: Sequence[Trial], commit: str
    ) -> dict[str, Any]:
        """What is settled before the first run of a stage, as JSON has it."""
        return {
            "part": self.part,
            "preset": self.preset,
            "data": list(self.data or PRESETS[self.preset].data),
            "metric": METRIC,
            "seeds": list(self.seeds(stage)),
            "commit": commit,
            "arms": {trial.name: dataclasses.asdict(trial) for trial in trials},
            "runs": {
                name: {"config": run.config, "settings": _plain(run.settings)}
                for name, run in runs.items()
            },
        }


def _cell(run: Run, seed: int) -> Cell:
    return Cell(f"{run.name}-seed{seed}", (Stage(run.config, {**run.settings, "seed": seed}),))


def _noise_label(settings: Settings) -> str:
    """noise4 for four grey levels; its schedule, where there is one."""
    label = f"noise{settings['views.epsilon']:g}"
    if start := settings.get("views.noise.start_epoch"):
        label += f"-from{start:g}"
    if ramp := settings.get("views.noise.ramp_epochs"):
        label += f"-ramp{ramp:g}"
    return label


def _plain(settings: Settings) -> dict[str, Any]:
    """Settings as they come back from JSON."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()
    }
