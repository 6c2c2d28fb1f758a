"""What all evaluations have in common: where weights and data come from, and how images are cut."""

import ml_collections


def get_config(task: str) -> ml_collections.ConfigDict:
    """Defaults of an evaluation."""
    config = ml_collections.ConfigDict()
    config.task = task
    # Workdir of a pre-training run, a weights file (.safetensors; .pth and the like with torch),
    # gs:// too, or random.
    config.checkpoint = ""
    config.seed = 0
    config.precision = "float32"
    # Frozen features are means over grid x grid windows of the last map; 1: over all of it.
    # `linear` and `finetune`, which train on random crops, have no use for it.
    config.grid = 1

    config.random = random = ml_collections.ConfigDict()  # the network, where checkpoint is random
    random.like = ""  # workdir or file whose architecture to take; else the next three
    random.backbone = "resnet50"
    random.stem = "imagenet"
    random.base_channels = 64

    config.data = data = ml_collections.ConfigDict()
    data.source = ""  # labelled training examples; empty: those of the pre-training run
    data.eval_source = ""  # held-out ones
    # folder:DIR: whether its sub-folders are the classes: auto, folders or none
    data.labels = "auto"
    data.image_column = ""  # as in configs/common.py, for sources named here
    data.label_column = ""
    data.video_seconds = 1.0
    # short side in pixels; 0: as the network was trained, see hexa_jax/evals/tasks/image_size.py
    data.resize = 0
    data.crop = 0  # centre crop in pixels, likewise
    data.squash = False  # the whole image, squashed to data.crop x data.crop, instead of its centre
    data.limit = 0  # training examples, spread evenly over the data set; 0: all
    # text file that lists the training examples to use, one path or file name a line; empty: all
    data.list = ""
    data.max_bad_fraction = 0.001  # as in configs/common.py, for evaluations that train

    config.runtime = runtime = ml_collections.ConfigDict()
    runtime.num_devices = 0  # 0: all
    runtime.batch_size = 256  # images of a forward pass
    runtime.workers = 0
    runtime.threads = 2
    runtime.prefetch = 4
    runtime.data_dir = ""
    runtime.data_cache = "~/.cache/hexa_jax"
    runtime.log_every = 50
    runtime.loggers = ("tensorboard",)
    return config


def voc07(task: str, protocol: str) -> ml_collections.ConfigDict:
    """Linear SVMs on Pascal VOC 2007: what both published protocols fix for all and for few training images."""
    config = get_config(task)
    goyal = protocol == "goyal"
    config.protocol = protocol
    config.costs = (0.01, 0.1) if goyal else (0.5,)
    config.grid = 2 if goyal else 1
    config.data.squash = goyal
    return config


def finetuning(config: ml_collections.ConfigDict, epochs: int) -> ml_collections.ConfigDict:
    """Settings of a run that trains the whole network."""
    config.epochs = epochs
    config.batch_size = 256
    config.data.augment = False  # random resized crops and flips
    config.data.min_scale = 0.08
    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.name = "sgd"  # sgd or adamax
    optimizer.learning_rates = (0.01,)  # of the backbone, trained one after another
    optimizer.classifier_factor = 1.0  # the classifier's learning rate, in units of the backbone's
    optimizer.momentum = 0.9
    optimizer.weight_decay = 0.0
    # epochs (from 0, fractions too) at whose start the learning rates are multiplied by `decay`
    optimizer.milestones = ()
    optimizer.decay = 0.1
    return config
