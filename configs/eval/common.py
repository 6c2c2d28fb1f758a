"""What all evaluations have in common: where weights and data come from, and how images are cut."""

import ml_collections


def get_config(task: str) -> ml_collections.ConfigDict:
    """Defaults of an evaluation."""
    config = ml_collections.ConfigDict()
    config.task = task
    # Workdir of a pre-training run, a weights file (.safetensors; .pth and the like with torch), or random.
    config.checkpoint = ""
    config.seed = 0
    config.precision = "float32"

    config.random = random = ml_collections.ConfigDict()  # the network, where checkpoint is random
    random.like = ""  # workdir or file whose architecture to take; else the next three
    random.backbone = "resnet50"
    random.stem = "imagenet"
    random.base_channels = 64

    config.data = data = ml_collections.ConfigDict()
    data.source = ""  # labelled training examples; empty: those of the pre-training run
    data.eval_source = ""  # held-out ones
    data.resize = 256  # short side
    data.crop = 224  # centre crop
    data.limit = 0  # training examples, spread evenly over the data set; 0: all
    data.max_bad_fraction = 0.001

    config.runtime = runtime = ml_collections.ConfigDict()
    runtime.num_devices = 0  # 0: all
    runtime.batch_size = 256  # images of a forward pass
    runtime.workers = 0
    runtime.threads = 2
    runtime.prefetch = 4
    runtime.data_dir = ""
    runtime.log_every = 50
    runtime.writer = "tensorboardX"
    return config
