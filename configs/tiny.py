"""Any method and scheme at a size that two CPU cores train in seconds; what the tests and the `tiny` preset run.

Command:   python -m hexa_jax.main --config=configs/tiny.py:method=moco,scheme=std+adv --workdir=DIR
Arguments: method=deepcluster (moco, pcl, simclr, swav, byol, simsiam, rotation, supervised);
    scheme=std+adv; epochs=2
Hardware:  two CPU cores.
Time:      about half a minute, most of it compiling.
Expected:  nothing: it is far too small to learn.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, method="deepcluster", scheme="std+adv", epochs=2)
    config = common.get_config()
    if choice.method == "rotation":
        common.rotation(config)
    elif choice.method == "supervised":
        common.supervised(config)
    config.method, config.scheme, config.epochs = choice.method, choice.scheme, choice.epochs
    if choice.method == "simsiam":
        config.method, config.byol.simsiam = "byol", True
    config.batch_size, config.bn_group_size, config.cutmix_block, config.shuffle_block = 32, 16, 16, 32
    config.model.backbone, config.model.stem, config.model.base_channels = "resnet10", "cifar", 4
    config.model.head_dim, config.model.head_hidden = 16, 16
    config.model.head_batch_norm = choice.method not in ("moco", "pcl")
    config.moco.queue_size, config.moco.momentum = 64, 0.99
    config.pcl.queue_size, config.pcl.momentum = 64, 0.99
    config.pcl.num_clusters, config.pcl.warmup_epochs = (5, 10), 1
    config.deepcluster.num_clusters, config.deepcluster.num_heads = 10, 2
    config.swav.num_prototypes = 10
    config.byol.momentum, config.byol.predictor_hidden = 0.9, 16
    config.optimizer.learning_rate = 0.05
    config.data.source, config.data.eval_source = "shapes:train", "shapes:test"
    config.data.shapes_count, config.data.shapes_size, config.data.crop_size = 128, 32, (16,)
    config.augment.blur_probability = (0.0,)
    config.knn.every_epochs, config.knn.neighbours = 1, 10
    config.knn.resize = config.knn.crop = 16
    config.linear.at_end = True
    config.runtime.log_every = 4
    return config
