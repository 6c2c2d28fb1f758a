"""HEXA_DCluster on the embedded data set `shapes`, small enough for two CPU cores; what `make quickstart` runs.

Command:   python -m hexa_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
Arguments: epochs=20
Hardware:  two CPU cores.
Time:      10 minutes and a half of processor time, the plain run included (docs/results.md).
Expected:  kNN accuracy at least 10 points above raw pixels and above random initialisation (docs/results.md has the figures).

The augmentation removes what shapes vary in besides the shape: any hue becomes any other. The
attack is made with the main BatchNorm, so that it shares the clean pass's backward.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    config = common.get_config()
    config.method = "deepcluster"
    config.epochs = common.arguments(text, epochs=20).epochs
    config.batch_size = 128
    config.bn_group_size = 128
    config.cutmix_block = 16  # the rows of one of 8 devices
    config.model.backbone = "resnet10"
    config.model.stem = "small"
    config.model.base_channels = 16
    config.model.head_hidden = 256
    config.model.head_batch_norm = True
    config.deepcluster.num_clusters = 100
    common.hard_examples(config)
    config.compare_with_plain = True
    config.views.attack_norm = "clean"
    config.optimizer.learning_rate = 0.12
    config.optimizer.schedule = "cosine"
    config.data.source = "shapes:train"
    config.data.eval_source = "shapes:test"
    config.data.shapes_count = 5120
    config.data.shapes_size = 32
    config.data.crop_size = (32,)
    config.data.min_scale = (0.3,)
    config.augment.jitter_probability = (1.0,)
    config.augment.hue = 0.5
    config.augment.blur_probability = (0.0,)
    config.knn.every_epochs = 5
    config.knn.train_limit = 4000
    config.knn.test_limit = 1000
    config.knn.resize = config.knn.crop = 32
    config.linear.at_end = True
    config.runtime.log_every = 20
    return config
