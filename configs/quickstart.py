"""HEXA_DCluster on the embedded data set `shapes`, small enough for two CPU cores; what `make quickstart` runs."""

from configs import common


def get_config():
    config = common.get_config()
    config.method = "deepcluster"
    config.epochs = 15
    config.batch_size = 128
    config.bn_group_size = 128
    config.data.source = "shapes:train"
    config.data.eval_source = "shapes:test"
    config.data.shapes_count = 5120
    config.data.crop_size = (32,)
    config.data.min_scale = (0.3,)
    config.augment.blur_probability = (0.0,)
    config.model.backbone = "resnet18"
    config.model.base_channels = 16
    config.model.stem = "cifar"
    config.model.head_hidden = 256
    config.model.head_batch_norm = True
    config.deepcluster.num_clusters = 100
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.12
    config.optimizer.schedule = "cosine"
    config.views.alpha1 = 1.0
    config.knn.every_epochs = 1
    config.knn.train_limit = 4000
    config.knn.test_limit = 1000
    config.knn.resize = 32
    config.knn.crop = 32
    config.linear.at_end = True
    config.runtime.log_every = 20
    return config
