"""Choose a run's settings from facts about images and device, without input or output.

The rules are few and plain, each choice has its reason, and every one of them can be overruled.
"""

import dataclasses
import math
from typing import Any, NamedTuple

# The paper's network: ResNet-50 on crops of 224 pixels.
PAPER, SMALL_ACCELERATOR, TINY_IMAGES, CPU = (
    "deepcluster_v2", "imagenette_deepcluster_v2", "cifar10_deepcluster_v2", "photographs",
)  # fmt: skip
PAPER_MEMORY = 12 << 30  # bytes of a device below which the paper's network is no pleasure
PHOTOGRAPH = 160  # short side in pixels from which images are cut into crops of 224
TINY = 48  # short side in pixels up to which whole images are crops
CPU_BUDGET = 8 * 60  # seconds that a run on a CPU should take, where the number of epochs can do it
CPU_BATCH = 128
FULL = 0.7  # of a device's memory, which images of one BatchNorm group may take
FEWEST_EPOCHS, MOST_EPOCHS = 5, 100  # of a run on a CPU
FEW_IMAGES = 10_000  # below which learning from scratch promises little
# Multiplications of one image of 224 pixels through a ResNet with the 7x7 stem.
MULTIPLICATIONS = {
    "resnet10": 0.89e9,
    "resnet18": 1.81e9,
    "resnet34": 3.66e9,
    "resnet50": 4.09e9,
    "resnet101": 7.8e9,
}
STEM = {"imagenet": 1.0, "small": 4.0, "cifar": 16.0}  # how many times as many
# Share of the speed of a large matrix product that a training step reaches. CPU: measured with
# ResNet-18 of 32 channels on crops of 64 and 96 pixels (0.34 to 0.37), and 0.12 with 16 channels.
# Accelerators wait for memory: half of what the traffic of the compiled step of moco_v2 allows on
# an H100 (138 GB a step of 256 images, compiled ahead of time), which nobody has measured yet.
EFFICIENCY = {"cpu": 0.35, "gpu": 0.15, "tpu": 0.2}
# Bytes that a training pass keeps for a crop of 224 pixels in bfloat16, twice that in float32: the
# compiler's 10.5 GiB for 256 crops and a ResNet-50, others by the sizes of their maps.
ACTIVATIONS = {
    "resnet10": 9e6,
    "resnet18": 12e6,
    "resnet34": 18e6,
    "resnet50": 44e6,
    "resnet101": 66e6,
}
NICE = (5, 10, 20, 30, 50, 100, 200, 300, 500, 1000, 2000, 3000)  # numbers of clusters


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What the images are like.

    Attributes:
        images: how many there are.
        short_side: median, in pixels.
        decode_seconds: for one core to read an image, on average.
        sampled, unreadable: images that were read to find out, and those of them that could not be.
        num_classes: that labels tell apart; 0 without labels.
    """

    images: int
    short_side: int
    decode_seconds: float = 0.005
    sampled: int = 0
    unreadable: int = 0
    num_classes: int = 0


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """What computes.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: for a person, such as "NVIDIA H100 80GB HBM3".
        count: devices.
        memory: bytes of each, 0 where nobody knows.
        cores: of the CPU, for this process.
        flops: floating-point operations per second of a large matrix product on one device.
    """

    platform: str
    kind: str
    count: int
    memory: int
    cores: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the user has decided.

    Attributes:
        recipe: its name with arguments; empty: the program's choice.
        backbone: name of the network that given weights are of, such as "resnet50"; empty: none
            given.
        base_channels, stem: of that network.
        settings: by dotted key, overruling whatever would be chosen.
    """

    recipe: str = ""
    backbone: str = ""
    base_channels: int = 64
    stem: str = "imagenet"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


class Choice(NamedTuple):
    """A setting, its value, and why."""

    key: str
    value: Any
    reason: str


class Recipe(NamedTuple):
    """A recipe by name, and why."""

    name: str
    reason: str


def choose_recipe(data: DataFacts, device: DeviceFacts, wishes: Wishes) -> Recipe:
    """Return the recipe that suits the images and the device."""
    if wishes.recipe:
        return Recipe(wishes.recipe, "as you said")
    if device.platform == "cpu":
        return Recipe(CPU, "a small network, for a CPU; `hexa recipes` lists others")
    if data.short_side <= TINY:
        return Recipe(TINY_IMAGES, f"for images of about 32 pixels (yours: {data.short_side})")
    if data.short_side < PHOTOGRAPH:
        return Recipe(
            SMALL_ACCELERATOR, f"images of {data.short_side} pixels are small for crops of 224"
        )
    if device.memory and device.memory < PAPER_MEMORY:
        return Recipe(
            SMALL_ACCELERATOR,
            f"{device.memory / 1e9:.0f} GB are little for a ResNet-50 at 224 pixels",
        )
    return Recipe(
        PAPER,
        "the paper's network and crops, without hard examples; hexa_dcluster has them, in 2.7 "
        "times the time",
    )


def choose(
    data: DataFacts, device: DeviceFacts, wishes: Wishes, recipe: dict[str, Any]
) -> tuple[list[Choice], "Estimate"]:
    """Return the settings that differ from a recipe's, or are worth a line, and the expected time.

    Args:
        data: of the images.
        device: that computes.
        wishes: of the user; what they fix is taken as given, and what depends on it follows.
        recipe: flat settings of the recipe, by dotted key.
    """
    chooser = _Chooser(data, device, wishes, recipe)
    chooser.choose()
    return chooser.choices, estimate(data, device, chooser.now)


class _Chooser:
    """Collects choices; `now` holds the settings with all of them."""

    def __init__(
        self, data: DataFacts, device: DeviceFacts, wishes: Wishes, recipe: dict[str, Any]
    ):
        self.data, self.device, self.wishes, self.recipe = data, device, wishes, recipe
        self.now = recipe | wishes.settings
        self.choices: list[Choice] = []

    def set(self, key: str, value: Any, reason: str) -> None:
        """Choose a value, unless the user has."""
        if key in self.wishes.settings:
            value, reason = self.wishes.settings[key], "as you said"
        self.now[key] = value
        self.choices = [choice for choice in self.choices if choice.key != key]
        self.choices.append(Choice(key, value, reason))

    def choose(self) -> None:
        """Choose everything, in an order in which each choice sees those that it depends on."""
        # a recipe that the user names is changed only where it cannot work
        own = not self.wishes.recipe
        if self.wishes.backbone:
            self._as_weights()
        self._crops(own)
        self._batch(own)
        self._labels_of_method()
        self._groups()
        if self.device.platform != "cpu":
            self.set(
                "precision",
                "bfloat16",
                "what accelerators compute fastest; parameters stay float32",
            )
        self.set(
            "runtime.microbatches",
            0,
            "as many as the memory needs, found out before the first step",
        )
        self._workers()
        self._epochs(own)
        for key, value in self.wishes.settings.items():
            self.set(key, value, "")

    def _as_weights(self) -> None:
        reason = "that of the weights it starts from"
        self.set("model.backbone", self.wishes.backbone, reason)
        if self.now["model.base_channels"] != self.wishes.base_channels:
            self.set("model.base_channels", self.wishes.base_channels, reason)
        if self.now["model.stem"] != self.wishes.stem:
            self.set("model.stem", self.wishes.stem, reason)

    def _crops(self, own: bool) -> None:
        if "data.crop_size" in self.wishes.settings:
            self._judge_at(max(self.wishes.settings["data.crop_size"]), always=False)
            return
        sizes, short = tuple(self.now["data.crop_size"]), self.data.short_side
        if own and self.device.platform == "cpu":
            size = next(
                (
                    s
                    for s in (96, 64)
                    if short >= s and self._epochs_in_budget(s) >= 2 * FEWEST_EPOCHS
                ),
                64,
            )
            size = min(size, _multiple(short, 8))
            narrow = self._epochs_in_budget(size) < FEWEST_EPOCHS and not self.wishes.backbone
            reason = (
                f"images of {short} pixels"
                if size < 64
                else f"enough epochs in about {CPU_BUDGET // 60} minutes"
            )
            self.set("data.crop_size", (size,), reason)
            if narrow:
                self.set("model.base_channels", 16, "with more, this CPU would take too long")
            self._judge_at(size, always=True)
        elif max(sizes) > 1.5 * short:
            size = max(_multiple(short, 32 if short >= 64 else 8), 8)
            fitted = tuple(min(each, size) for each in sizes)
            self.set("data.crop_size", fitted, f"images of {short} pixels have no more to show")
            self._judge_at(size, always=True)

    def _judge_at(self, size: int, always: bool) -> None:
        """Let kNN see images of the crops' size, unless the recipe's own suits them."""
        if always or self.now["knn.crop"] > 1.5 * size:
            for key in ("knn.resize", "knn.crop"):
                if key not in self.wishes.settings:
                    self.now[key] = size
                    self.choices.append(Choice(key, size, "as the crops"))

    def _epochs_in_budget(self, size: int) -> float:
        now = self.now | {"data.crop_size": (size,)}
        return CPU_BUDGET / max(estimate(self.data, self.device, now).epoch, 1e-9)

    def _batch(self, own: bool) -> None:
        images, before = self.data.images, self.recipe["batch_size"]
        if "batch_size" in self.wishes.settings:
            self.set("batch_size", self.now["batch_size"], "")
        elif own:
            # At least 20 steps an epoch, where the images allow batches of 32.
            most = CPU_BATCH if self.device.platform == "cpu" else before
            batch = self._shared(_power_of_two(min(most, max(images // 20, 32), images)))
            self.set("batch_size", batch, f"{images // batch} steps an epoch")
        elif before > images or before % self.device.count:
            batch = self._shared(_power_of_two(images) if before > images else before)
            self.set("batch_size", batch, f"{images} images on {self.device.count} devices")
        batch = self.now["batch_size"]
        if batch != before:
            for key in ("optimizer.learning_rate", "optimizer.final_learning_rate"):
                if self.recipe[key]:
                    self.set(
                        key,
                        float(f"{self.recipe[key] * batch / before:.4g}"),
                        "in proportion to the batch",
                    )
        group = self.now["bn_group_size"]
        if group != batch and (group == before or batch % group):
            self.set("bn_group_size", batch, "the whole batch shares BatchNorm statistics")
        blocks = {
            "cutmix_block": mixes(self.now),
            "shuffle_block": self.now["method"] in ("moco", "pcl"),
        }
        for key, used in blocks.items():
            if used and batch % self.now[key]:
                self.set(key, math.gcd(batch, self.now[key]), "a divisor of the batch")

    def _shared(self, batch: int) -> int:
        """Return a batch size near the given one that the devices share equally."""
        rounded = max(batch // self.device.count, 1) * self.device.count
        return rounded if rounded <= self.data.images else batch

    def _labels_of_method(self) -> None:
        """Clusters, prototypes or queue: no more than the images can fill."""
        images = self.data.images // self.now["batch_size"] * self.now["batch_size"]
        method = self.now["method"]
        if method in ("deepcluster", "swav"):
            key = {"deepcluster": "deepcluster.num_clusters", "swav": "swav.num_prototypes"}[method]
            fitting = max(
                [n for n in NICE if n <= images / 20] or [min(NICE[0], max(images // 2, 1))]
            )
            if self.now[key] > fitting or not self.wishes.recipe:
                self.set(key, min(fitting, 3000), f"about {images // fitting} images each")
        elif method in ("moco", "pcl"):
            key = f"{method}.queue_size"
            batch, before = self.now["batch_size"], self.now[key]
            if before > images // 2:
                few = f"half of the {self.data.images} images: more would hold their own older keys"
                self.set(key, max(images // 2 // batch, 1) * batch, few)
            elif before % batch:
                self.set(key, before // batch * batch, "whole batches")

    def _groups(self) -> None:
        """BatchNorm groups that a microbatch can hold, where the whole batch may not fit."""
        if (
            not self.device.memory
            or "bn_group_size" in self.wishes.settings
            or self.device.platform == "cpu"
        ):
            return
        group, size = self.now["bn_group_size"], self._bytes_of_image()
        rows = max(self.now["batch_size"] // self.device.count, 1)
        if group * size <= FULL * self.device.memory * max(group // rows, 1):
            return
        # A group within a device, of at least 32 images where there are so many.
        divisors = [n for n in range(1, rows + 1) if rows % n == 0 and n <= group]
        fitting = [n for n in divisors if n * size <= FULL * self.device.memory]
        least = min([n for n in divisors if n >= 32] or divisors[-1:])
        smaller = max([*fitting, least])
        if smaller != group:
            self.set(
                "bn_group_size",
                smaller,
                "images that share BatchNorm statistics: as many as the memory holds",
            )

    def _bytes_of_image(self) -> float:
        backbone, _, width = self.now["model.backbone"].partition("w")
        per_crop = ACTIVATIONS.get(backbone, 44e6) * int(width or 1)
        per_crop *= self.now["model.base_channels"] / 64 * STEM[self.now["model.stem"]]
        crops = sum(
            n * (s / 224) ** 2
            for n, s in zip(self.now["data.num_crops"], self.now["data.crop_size"], strict=True)
        )
        return per_crop * crops * (1 if self.now["precision"] == "bfloat16" else 2)

    def _workers(self) -> None:
        cores = self.device.cores
        if self.device.platform == "cpu":
            self.set("runtime.workers", 0, "the cores are busy with the network")
            self.set("runtime.threads", max(cores, 1), f"{cores} CPU cores read the images")
            return
        needed = math.ceil(speed(self.device, self.now) * (self.data.decode_seconds + 0.002))
        workers = min(max(needed, 2), max(cores - 1, 1), 64)
        short = f", {needed} would keep up with the network" if needed > workers else ""
        self.set(
            "runtime.workers",
            workers,
            f"reading an image takes {1000 * self.data.decode_seconds:.0f} ms{short}",
        )

    def _epochs(self, own: bool) -> None:
        if "epochs" in self.wishes.settings:
            self.set("epochs", self.wishes.settings["epochs"], "")
        elif own and self.device.platform == "cpu":
            fitting = int(self._epochs_in_budget(max(self.now["data.crop_size"])))
            epochs = min(max(fitting, FEWEST_EPOCHS), MOST_EPOCHS)
            few = f"fewer than {FEWEST_EPOCHS} epochs teach nothing: an accelerator, or --config.data.limit=N, is faster"
            self.set(
                "epochs",
                epochs,
                few if fitting < FEWEST_EPOCHS else f"about {CPU_BUDGET // 60} minutes",
            )
        elif own:
            # As many steps as 200 epochs of 100,000 images, in at most 800 epochs.
            epochs = (
                200
                if self.data.images >= 100_000
                else min(800, math.ceil(200 * math.sqrt(1e5 / self.data.images)))
            )
            self.set(
                "epochs",
                epochs,
                "the paper's" if epochs == 200 else "more than the paper's 200: fewer images",
            )


def _power_of_two(number: int) -> int:
    """The largest power of two up to a number, at least 1."""
    return 1 << max(number.bit_length() - 1, 0)


def _multiple(size: int, step: int) -> int:
    """The largest multiple of `step` up to a size, at least `step`."""
    return max(size // step * step, step)


def mixes(settings: dict[str, Any]) -> bool:
    """Whether a view mixes images of a batch."""
    scheme = str(settings["scheme"]).lower()
    views = ("cutmix", "cutmix_adversarial", "mixup")
    return (
        "cmx" in scheme
        or "mixup" in scheme
        or any(settings[f"views.{view}.weight"] for view in views)
    )


# ---- Time ----------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """Estimate seconds of compiling and a first pass, of an epoch, and in all."""

    start: float
    epoch: float
    total: float
    limit: str


def estimate(data: DataFacts, device: DeviceFacts, settings: dict[str, Any]) -> Estimate:
    """Return the expected time of a run with these flat settings."""
    compute = data.images / speed(device, settings)
    reading = data.images * (data.decode_seconds + 0.002)  # crops are cut in about 2 ms
    if device.platform == "cpu":  # the same cores do both
        epoch = compute + reading / max(device.cores, 1)
        limit = "reading the images" if reading / max(device.cores, 1) > compute else "the network"
    else:
        workers = max(settings["runtime.workers"], 1)
        epoch = max(compute, reading / workers)
        limit = "reading the images" if reading / workers > compute else "the network"
    first = 0.3 * epoch if settings["method"] == "deepcluster" else 0.0
    compiling = 60.0 if device.platform == "cpu" else 90.0
    return Estimate(compiling + first, epoch, compiling + first + settings["epochs"] * epoch, limit)


def speed(device: DeviceFacts, settings: dict[str, Any]) -> float:
    """Return the images per second that the devices train on, by arithmetic."""
    efficiency = EFFICIENCY.get(device.platform, 0.1)
    if device.platform == "cpu":
        efficiency *= min(settings["model.base_channels"] / 32, 1.0) ** 1.5
    return device.count * device.flops * efficiency / flops_per_image(settings)


def flops_per_image(settings: dict[str, Any]) -> float:
    """Return the FLOPs of a training step for one image, all crops and views."""
    backbone, _, width = settings["model.backbone"].partition("w")
    forward = 2 * MULTIPLICATIONS.get(backbone, 4.09e9) * int(width or 1) ** 2
    forward *= (settings["model.base_channels"] / 64) ** 2 * STEM.get(settings["model.stem"], 1.0)
    crops = sum(
        count * (size / 224) ** 2
        for count, size in zip(settings["data.num_crops"], settings["data.crop_size"], strict=True)
    )
    passes = 3.0  # forward and twice as much backward
    views = {
        "adversarial": 5.0,
        "cutmix": 3.0,
        "cutmix_adversarial": 3.0,
        "mixup": 3.0,
        "extra": 3.0,
        "noise": 3.0,
    }
    passes += sum(cost for view, cost in views.items() if settings.get(f"views.{view}.weight"))
    return forward * crops * passes
