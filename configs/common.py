"""Every configuration key with its default; a variant in this folder is this file plus what differs.

Values in `config.runtime` say how to run, not what to compute: they may change when a run is
resumed. All others may not.
"""

import types
from typing import Any

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The defaults: plain 2-crop pre-training of a ResNet-50."""
    config = ml_collections.ConfigDict()
    config.task = "pretrain"  # what to do; evaluations have configs of their own in configs/eval/
    config.method = "moco"  # moco, pcl, simclr, deepcluster, swav, byol, rotation or supervised
    # Which terms equation 10 has, as a sum of std, adv, cmx, cmxA (cut-mixed adversarial), mixup,
    # extra, noise, hard_crop; Fig. 2 has std, std+adv, std+cmx, std+adv+cmx, std+adv+cmxA and all
    # (std+adv+cmx+cmxA). Views named here whose weight is 0 below count 1, others not at all.
    # Empty: the weights alone decide.
    config.scheme = ""
    # Train the same recipe without hard views first, in the folder plain/ of the workdir, and show
    # both in one report.
    config.compare_with_plain = False
    config.seed = 0
    # bfloat16 (compute only; parameters and statistics stay float32), float32 (accelerators may
    # still round the factors of products: JAX_DEFAULT_MATMUL_PRECISION=highest forbids it) or
    # float64 (for equality tests)
    config.precision = "float32"
    config.epochs = 200
    config.batch_size = 256  # examples of a step on all devices together
    # consecutive rows that share BatchNorm statistics, wherever they are computed
    config.bn_group_size = 32
    config.cutmix_block = 32  # CutMix partners are drawn among this many consecutive rows
    # MoCo's keys are shuffled among this many consecutive rows (shuffle-BN)
    config.shuffle_block = 256

    config.model = model = ml_collections.ConfigDict()
    model.backbone = "resnet50"  # resnet18, 34, 50, 101, with an optional width such as resnet50w2
    # imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1; small: 3x3 stride 2
    model.stem = "imagenet"
    model.base_channels = 64  # channels of the stem; smaller for experiments on a CPU
    model.zero_init_residual = False
    # Weights that the backbone starts from; heads stay random. Empty: random ones. A workdir of
    # this program, a .safetensors, .npz or .pth file, timm:NAME, torchvision:NAME[:WEIGHTS] or
    # hf:REPO[@REVISION]. A resumed run does not read them again.
    model.init = ""
    model.head_hidden = 0  # width of the head's hidden layer; 0: as wide as the feature
    model.head_dim = 128
    model.head_batch_norm = False  # before each of the head's ReLUs
    model.head_layers = 2  # 1: a linear head
    model.head_output_norm = False  # BatchNorm without scale and bias behind the head's last layer

    config.moco = moco = ml_collections.ConfigDict()
    moco.queue_size = 65536
    moco.momentum = 0.999  # of the key encoder
    moco.temperature = 0.2

    config.pcl = pcl = ml_collections.ConfigDict()
    pcl.queue_size = 16384
    pcl.momentum = 0.999  # of the key encoder
    pcl.temperature = 0.2  # of InfoNCE, and the mean of the prototypes' concentrations
    pcl.num_clusters = (25_000, 50_000, 100_000)  # of each clustering
    pcl.iterations = 20  # of k-means
    pcl.warmup_epochs = 20  # without prototypes; at least 1

    config.deepcluster = deepcluster = ml_collections.ConfigDict()
    deepcluster.num_clusters = 3000
    deepcluster.num_heads = 3  # head h clusters the embeddings of crop h mod assign_crops
    deepcluster.assign_crops = 2
    deepcluster.iterations = 10
    deepcluster.temperature = 0.1

    config.simclr = simclr = ml_collections.ConfigDict()
    simclr.temperature = 0.1

    config.swav = swav = ml_collections.ConfigDict()
    swav.num_prototypes = 3000
    swav.assign_crops = 2
    swav.temperature = 0.1
    swav.epsilon = 0.05  # of Sinkhorn-Knopp
    swav.iterations = 3
    # older embeddings that take part in Sinkhorn-Knopp, a multiple of the batch size; 0: none
    swav.queue_length = 0
    swav.queue_start_epoch = 0  # from 0
    swav.freeze_steps = 0  # steps in which the prototypes stay as they are

    config.byol = byol = ml_collections.ConfigDict()
    byol.momentum = 0.996  # of the target network in the first step; a cosine takes it to 1
    byol.predictor_hidden = 4096
    byol.simsiam = False  # the network is its own target, and the loss is half as large

    config.rotation = ml_collections.ConfigDict()  # no settings

    config.supervised = supervised = ml_collections.ConfigDict()
    supervised.label_smoothing = 0.0

    config.views = views = ml_collections.ConfigDict()
    # divide equation 10 by the sum of its weights: steps as long as the plain method's
    views.average = False
    # The attack, which adversarial views, cut-mixed adversarial views and noise share.

    # radius, in grey levels of 255 (the paper gives no unit; the second reading is 0.45)
    views.epsilon = 1.0
    views.step_size = 1.0  # eta of equation 6, in grey levels
    views.steps = 1
    views.norm = "linf"  # linf or l2
    views.random_start = False
    # BatchNorm set used while making the attack: adversarial or clean
    views.attack_norm = "adversarial"
    # with clean: take the attack's first gradient from the clean backward pass
    views.share_gradient = True
    views.max_increase = (
        0.0  # t of the adaptive radius min(epsilon, t / |gradient|_1), in units of the loss; 0: epsilon
    )

    def hard_view(**own: Any) -> ml_collections.ConfigDict:
        """A view's settings: those that all have, and its own."""
        return ml_collections.ConfigDict(
            dict(
                weight=0.0,  # alpha of equation 10; 0: none
                start_epoch=0.0,  # epoch (from 0) from which on the view counts
                ramp_epochs=0.0,  # epochs over which its weight then grows linearly; 0: at once
                replace=0.0,  # share of the rows whose clean view it takes the place of; 0: it is added to all rows
                target="label",  # label, or own_crop: predict the clean crop's own embedding (moco, pcl, simclr, byol)
                **own,
            )
        )

    views.adversarial = hard_view()
    views.cutmix = hard_view(
        alpha=5.0, beta=3.0, one_box=False
    )  # lambda ~ Beta(alpha, beta); one_box: one for all images of a step
    views.cutmix_adversarial = hard_view(alpha=5.0, beta=3.0, one_box=False)  # Fig. 2's "CmxA"
    # probability that an image is blended at all
    views.mixup = hard_view(probability=1.0, alpha=1.0, beta=1.0)
    views.extra = hard_view()  # a second clean view: the control of equal passes
    views.noise = hard_view()  # random signs of the attack's size: the control of the attack
    views.hard_crop = hard_view(candidates=2)  # of so many new crops the one with the highest loss

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.name = "sgd"  # sgd, larc, lars or adam
    optimizer.learning_rate = 0.03
    optimizer.momentum = 0.9
    optimizer.weight_decay = 1e-4  # on all parameters; lars: not on BatchNorm and biases
    optimizer.trust_coefficient = 0.001  # larc and lars
    # epoch_cosine: changes once per epoch, no warm-up; cosine: per step, with warm-up; steps: at
    # `milestones`
    optimizer.schedule = "epoch_cosine"
    optimizer.final_learning_rate = 0.0  # cosine
    optimizer.warmup_epochs = 0  # cosine
    optimizer.warmup_start = 0.0  # cosine
    optimizer.milestones = (
        120,
        160,
    )  # steps: epochs (from 0, fractions too) at whose start the learning rate is multiplied by `decay`
    optimizer.decay = 0.1  # steps

    config.data = data = ml_collections.ConfigDict()
    # a folder or file, or KIND:WHERE: docs/own_images.md lists the kinds
    data.source = "tfds:imagenet2012:train"
    # Held-out examples for the online kNN and linear probe, and for evaluations of the run. Empty:
    # leave-one-out kNN on the training images. A recipe's own are left out where
    # --config.data.source names another data set.
    data.eval_source = ""
    # Whether the sub-folders of images are their classes, which nothing but accuracies uses: auto
    # (yes, unless their names are dates or images lie beside them), folders (yes) or none, which
    # leaves out labels of other kinds, too.
    data.labels = "auto"
    data.image_column = ""  # parquet, hf: the column of images; empty: found by types and names
    data.label_column = ""  # parquet, hf: the column of labels, likewise
    data.video_seconds = 1.0  # video: time between two frames
    data.limit = 0  # use so many examples, spread evenly over the data set; 0: all
    data.shapes_size = 32  # shapes: side in pixels
    data.shapes_count = 10_000  # shapes: number of images
    data.num_crops = (2,)  # per resolution; MoCo's key is the last crop of the first
    data.crop_size = (224,)
    data.min_scale = (0.2,)  # share of the image's area
    data.max_scale = (1.0,)
    # smallest and largest width / height of a crop's box
    data.aspect_ratio = (0.75, 1.3333333333333333)
    # crops mirrored with probability 1/2 each: none, horizontal, vertical or both
    data.flip = "horizontal"
    data.quarter_turns = False  # and turned by 0 to 3 quarters: for images without an up and a down
    # Augmentation for a kind of images in place of the recipe's: natural, aerial, microscopy or
    # grey (hexa_jax/data/domains.py). The command line sets it; settings of the same command count
    # more. In Python hexa_jax.data.domains.set_domain(config, NAME) does. Empty: the recipe's own.
    data.domain = ""
    # keep the whole data set on each device and cut crops there (small images of one size)
    data.on_device = False
    # More unreadable images than this share of all stop the run; a handful (10, or 5 % of fewer
    # than 200) never does, unless this is 0. It may change when a run is resumed.
    data.max_bad_fraction = 0.001
    # measured: pixel_mean and pixel_std are computed from a fixed sample of the training images at
    # the first start, and recorded in the workdir; fixed: those given here.
    data.normalization = "fixed"
    data.pixel_mean = (0.485, 0.456, 0.406)
    data.pixel_std = (0.229, 0.224, 0.225)

    config.augment = augment = ml_collections.ConfigDict()
    # Probabilities are tuples: one number for all crops, or one per crop in order.
    augment.jitter_probability = (0.8,)
    augment.brightness = 0.4
    augment.contrast = 0.4
    augment.saturation = 0.4
    augment.hue = 0.1
    augment.gray_probability = (0.2,)
    augment.blur_probability = (0.5,)
    augment.blur_sigma = (0.1, 2.0)  # in pixels of the crop
    augment.solarize_probability = (0.0,)

    config.knn = knn = ml_collections.ConfigDict()
    # kNN accuracy before, on the way and at the end, when there are labels; 0: at the end only
    knn.every_epochs = 10
    # Labeled examples to measure accuracy with in place of the training images: a folder with a
    # folder of images per class, or another source. Without a data.eval_source each of them is
    # judged by the others.
    knn.source = ""
    knn.neighbours = 20
    knn.temperature = 0.07
    knn.train_limit = 20_000  # examples in the bank; 0: all
    knn.test_limit = 5_000
    # Short side and centre crop in pixels. Where the command line changes data.crop_size alone,
    # they follow it.
    knn.resize = 256
    knn.crop = 224
    # at the end raw pixels, too: minutes of a CPU for ten thousand images, the same for every run
    knn.pixels = True

    # Clean BatchNorm statistics, by which a network is evaluated: running, or reestimated (the mean
    # over one pass of clean training crops, put in their place before each of the run's own
    # evaluations and at its end). Running ones of a short run lag behind, and hard views with the
    # clean set write into them.
    config.eval_statistics = "running"

    config.linear = linear = ml_collections.ConfigDict()
    linear.every_epochs = (
        0  # accuracy of a linear probe on the kNN's examples, on the way and at the end; 0: not on the way
    )
    linear.at_end = False  # and at the end, even where every_epochs is 0
    linear.regularization = 1e-4  # of multinomial logistic regression on standardised features

    # Measures without labels (effective rank, alignment, uniformity, neighbors and clusters) of a
    # sample of the training images: before training, on the way and at the end. They may change
    # when a run is resumed.
    config.health = health = ml_collections.ConfigDict()
    health.every_epochs = 1  # 0: none
    health.images = 1024  # of the sample; they stay in memory, 150 KB each at 224 pixels

    config.runtime = runtime = ml_collections.ConfigDict()
    runtime.num_devices = 0  # 0: all
    # Sequential parts of a step: less memory, the same result. 0: the smallest number that fits the
    # device, found out by compiling; another number in another start changes results by roundings.
    runtime.microbatches = 1
    # before the first step, whether it fits the devices; False: try it all the same
    runtime.check_memory = True
    runtime.workers = 0  # input worker processes; 0: threads of this process
    runtime.threads = 2  # of this process, when workers is 0
    runtime.prefetch = 4  # batches read ahead by all workers together
    # where tfds data sets are (gs:// too), and what relative paths start from
    runtime.data_dir = ""
    # Local folder for copies of data in a bucket, fetched before the run. Empty: tfds data sets are
    # read in place, with a request for each image: for more data than the disk holds.
    runtime.data_cache = "~/.cache/hexa_jax"
    runtime.log_every = 50  # steps
    # Epochs from one report/index.html to the next, as long as reports take less than a twentieth
    # of the time; 0: at the end only.
    runtime.report_every = 1
    runtime.checkpoint_every = 0  # steps; 0: once per epoch
    runtime.keep_last = 2  # checkpoints
    runtime.keep_every = 0  # epochs: each k-th epoch's checkpoint stays for ever; 0: none
    # The best checkpoint by this measure of health stays, too: rankme, rankme_embedding, alignment,
    # uniformity, neighbor_agreement, cluster_stability or cluster_evenness. Evaluations load it by
    # --config.checkpoint=WORKDIR@best. Empty: none.
    runtime.keep_best = ""
    # Where metrics go besides metrics.jsonl: any of tensorboard, wandb, mlflow, trackio. All but
    # the first are to be installed, and work without a network, too (WANDB_MODE=offline).
    runtime.loggers = ("tensorboard",)
    return config


def hard_examples(
    config: ml_collections.ConfigDict, alpha1: float = 1.0, alpha2: float = 0.0
) -> ml_collections.ConfigDict:
    """Turn a plain recipe into HEXA: the paper's weights of adversarial and cut-mixed views, everything else as it is."""
    config.views.adversarial.weight, config.views.cutmix.weight = alpha1, alpha2
    return config


def arguments(text: str | None, **defaults: Any) -> Any:
    """What follows the colon in `--config=configs/NAME.py:epochs=800,crops=8`, as attributes; others keep their defaults.

    Raises:
        ValueError: unknown name, or a value of another type than the default's.
    """
    values = dict(defaults)
    for word in filter(None, (text or "").split(",")):
        name, equals, value = word.partition("=")
        if name not in defaults or not equals:
            known = ", ".join(f"{key}={default}" for key, default in defaults.items())
            raise ValueError(f"config argument {word!r} is not known: after the colon come {known}")
        kind = type(defaults[name])
        try:
            values[name] = kind(value)
        except ValueError:
            raise ValueError(f"config argument {name}={value!r} must be of type {kind.__name__}") from None
    return types.SimpleNamespace(**values)


def milestones(epochs: int, *parts: int, of: int = 100) -> tuple[float, ...]:
    """Return the epochs at which so many parts of a run are over, for `optimizer.milestones`.

    They may lie inside an epoch: rounded down, those of a run of one epoch would all lie before its
    first step.

    Args:
        epochs: of the run.
        parts: per cent of it, or epochs of a run of `of` epochs.
        of: how many parts the whole run has.
    """
    return tuple(epochs * part // of if epochs * part % of == 0 else epochs * part / of for part in parts)


# Crops of the reference scripts: count, side, smallest and largest share of the image's area, per
# resolution.
CROPS = {
    2: ((2,), (224,), (0.08,), (1.0,)),
    6: ((2, 4), (160, 96), (0.08, 0.05), (1.0, 0.14)),
    8: ((2, 6), (224, 96), (0.14, 0.05), (1.0, 0.14)),
}


def multi_crop(config: ml_collections.ConfigDict, crops: int) -> ml_collections.ConfigDict:
    """2, 6 or 8 crops as facebookresearch/swav's scripts cut them."""
    if crops not in CROPS:
        raise ValueError(f"crops={crops} is not known: use one of {', '.join(map(str, CROPS))}")
    data = config.data
    data.num_crops, data.crop_size, data.min_scale, data.max_scale = CROPS[crops]
    return config


def larc_batch(config: ml_collections.ConfigDict, batch: int) -> ml_collections.ConfigDict:
    """LARC at the two batch sizes of facebookresearch/swav's scripts: 256 on one machine, 4096 on eight."""
    config.batch_size = batch
    config.bn_group_size = min(512, batch)  # 8 GPUs of 64 share statistics
    o = config.optimizer
    if batch == 256:
        o.learning_rate, o.final_learning_rate = 0.6, 0.0006
    elif batch == 4096:
        o.learning_rate, o.final_learning_rate = 4.8, 0.0048
        o.warmup_epochs, o.warmup_start = 10, 0.3
    else:
        raise ValueError(f"batch={batch} has no recipe: use 256 or 4096")
    return config


def on_imagenet(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """How the ImageNet recipes run: bfloat16 is ours, the references compute in float32 or float16.

    The validation set judges the network on the way, and is what a linear probe of the run is
    tested on.
    """
    config.data.eval_source = "tfds:imagenet2012:validation"
    config.precision = "bfloat16"
    config.runtime.workers = 8  # one decodes and cuts a few hundred images a second
    return config


def swav_family(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """What DeepCluster-v2 and SwAV share: head, augmentation and LARC of facebookresearch/swav."""
    config.model.head_hidden = 2048
    config.model.head_batch_norm = True
    config.data.pixel_std = (0.228, 0.224, 0.225)  # sic: not .229
    strong_jitter(config)
    config.optimizer.name = "larc"
    config.optimizer.weight_decay = 1e-6
    config.optimizer.schedule = "cosine"
    return config


def strong_jitter(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """SimCLR's colour distortion at strength 1, which the SwAV family uses, too; crops from 8 % of the image."""
    config.data.min_scale = (0.08,)
    config.augment.brightness = config.augment.contrast = config.augment.saturation = 0.8
    config.augment.hue = 0.2
    return config


def deepcluster(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """DeepCluster-v2's recipe at B = 256."""
    config.method = "deepcluster"
    return larc_batch(swav_family(config), 256)


def swav(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """SwAV's recipe at B = 256, without its queue."""
    config.method = "swav"
    return larc_batch(swav_family(config), 256)


def simclr(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """SimCLR's head, augmentation and temperature; one BatchNorm group has to be set to the batch."""
    config.method = "simclr"
    config.model.head_batch_norm = True
    return strong_jitter(config)


def byol(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """BYOL's heads and augmentation: the second crop is blurred less and solarized more than the first."""
    config.method = "byol"
    config.model.head_batch_norm = True
    config.model.head_hidden, config.model.head_dim = 4096, 256
    config.data.min_scale = (0.08,)
    config.augment.saturation = 0.2
    config.augment.blur_probability = (1.0, 0.1)
    config.augment.solarize_probability = (0.0, 0.2)
    return config


def rotation(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Rotation prediction: one crop, seen in four orientations, flipped but not distorted."""
    config.method = "rotation"
    config.data.num_crops, config.data.min_scale = (1,), (0.08,)
    config.augment.jitter_probability = config.augment.gray_probability = config.augment.blur_probability = (0.0,)
    return config


def supervised(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Classification: one crop, flipped but not distorted."""
    config.method = "supervised"
    config.data.num_crops, config.data.min_scale = (1,), (0.08,)
    config.augment.jitter_probability = config.augment.gray_probability = (0.0,)
    config.augment.blur_probability = (0.0,)
    return config


def small_images(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """CIFAR-10 and other data sets of 32-pixel images: ResNet-18, cifar stem, no blur, everything on the device."""
    config.model.backbone = "resnet18"
    config.model.stem = "cifar"
    config.data.source = "tfds:cifar10:train"
    config.data.eval_source = "tfds:cifar10:test"
    config.data.crop_size = (32,)
    config.data.on_device = True
    config.data.pixel_mean = (0.4914, 0.4822, 0.4465)
    config.data.pixel_std = (0.2470, 0.2435, 0.2616)
    config.augment.blur_probability = (0.0,)
    config.eval_statistics = "reestimated"
    # docs/results.md: the sum at an unchanged learning rate costs more than the attack
    config.views.average = True
    return benchmark_evaluations(config)


def imagenette(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Imagenette at 160 pixels, and other small sets of photographs: ResNet-18, crops of 128 pixels.

    As in the benchmark of lightly-ai/lightly on Imagenette: B = 256, kNN with k = 200 and
    temperature 0.1 at 128 pixels.
    """
    config.model.backbone = "resnet18"
    config.epochs = 200
    config.batch_size = 256
    config.data.source = "tfds:imagenette/160px-v2:train"
    config.data.eval_source = "tfds:imagenette/160px-v2:validation"
    config.data.crop_size = (128,)
    config.eval_statistics = "reestimated"
    config.views.average = True  # as for smaller images
    return benchmark_evaluations(config)


def benchmark_evaluations(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Evaluate on all images at the crops' size, as the benchmarks of lightly-ai/lightly on small images do."""
    config.knn.resize = config.knn.crop = max(config.data.crop_size)
    config.knn.neighbours = 200
    config.knn.temperature = 0.1
    config.knn.train_limit = 0
    config.knn.test_limit = 0
    config.linear.at_end = True
    return config


def benchmark_sgd(config: ml_collections.ConfigDict, learning_rate: float) -> ml_collections.ConfigDict:
    """SGD with weight decay 5e-4 and a cosine per epoch, as the small-image benchmarks of lightly-ai/lightly train."""
    o = config.optimizer
    o.name, o.learning_rate, o.weight_decay, o.schedule = "sgd", learning_rate, 5e-4, "epoch_cosine"
    return config


def falling_steps(config: ml_collections.ConfigDict, epochs: int) -> ml_collections.ConfigDict:
    """SGD at 0.1, x0.2 at 30, 60 and 80 % of the epochs, weight decay 5e-4 (Zagoruyko and Komodakis, 2016)."""
    benchmark_sgd(config, 0.1)
    config.epochs = epochs
    config.data.min_scale = (0.2,)
    config.optimizer.schedule, config.optimizer.decay = "steps", 0.2
    config.optimizer.milestones = milestones(epochs, 30, 60, 80)
    return config
