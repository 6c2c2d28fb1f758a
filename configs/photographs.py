"""DeepCluster-v2 on a folder of photographs, small enough for a few CPU cores; what `hexa pretrain` takes without an accelerator.

Command:   python -m hexa_jax.main --config=configs/photographs.py --workdir=DIR --config.data.source=folder:DIR
           `hexa pretrain DIR` fits batch, clusters, crops and epochs to the images and the machine
Arguments: size=96 (side of the crops, in pixels); batch=64: the learning rate follows it;
    clusters=100; epochs=20
Hardware:  two CPU cores or more.
Time:      `hexa pretrain DIR --dry-run` says it for the machine that it runs on.
Expected:  nothing measured here yet; a thousand images are few to learn from without other weights to start from.

Ours: a ResNet-18 of half the usual width with the augmentation of configs/deepcluster_v2.py, crops
from a fifth of the image, and SGD as in configs/quickstart.py, whose learning rate is 0.12 for 128
images.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, size=96, batch=64, clusters=100, epochs=20)
    config = common.strong_jitter(common.get_config())
    config.method = "deepcluster"
    config.epochs = choice.epochs
    config.batch_size = config.bn_group_size = choice.batch
    config.model.backbone, config.model.base_channels = "resnet18", 32
    config.model.head_hidden, config.model.head_batch_norm = 256, True
    config.deepcluster.num_clusters = choice.clusters
    config.optimizer.learning_rate = 0.12 * choice.batch / 128
    config.optimizer.schedule = "cosine"
    config.data.source = ""
    config.data.crop_size, config.data.min_scale = (choice.size,), (0.2,)
    config.eval_statistics = "reestimated"
    config.knn.every_epochs, config.knn.resize, config.knn.crop = 5, choice.size, choice.size
    config.runtime.log_every = 10
    return config
