"""Every configuration key with its default; a variant in this folder is this file plus what differs.

Values in `config.runtime` say how to run, not what to compute: they may change when a run is resumed. All others may not.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The defaults: plain 2-crop pre-training of a ResNet-50."""
    config = ml_collections.ConfigDict()
    config.task = "pretrain"  # what to do; pretrain is the only task so far
    config.method = "moco"  # moco, simclr, deepcluster, swav or rotation
    # Which terms of equation 10 there are, by the names of Fig. 2: std, std+adv, std+cmx, std+adv+cmx, std+adv+cmxA, all.
    # Terms whose weight is 0 below then count 1. Empty: the weights alone decide.
    config.scheme = ""
    config.seed = 0
    # bfloat16 (compute only; parameters and statistics stay float32), float32 (accelerators may still round the factors of
    # products: JAX_DEFAULT_MATMUL_PRECISION=highest forbids it) or float64 (for equality tests)
    config.precision = "float32"
    config.epochs = 200
    config.batch_size = 256  # examples of a step on all devices together
    config.bn_group_size = 32  # consecutive rows that share BatchNorm statistics, wherever they are computed
    config.cutmix_block = 32  # CutMix partners are drawn among this many consecutive rows
    config.shuffle_block = 256  # MoCo's keys are shuffled among this many consecutive rows (shuffle-BN)

    config.model = model = ml_collections.ConfigDict()
    model.backbone = "resnet50"  # resnet18, 34, 50, 101, with an optional width such as resnet50w2
    model.stem = "imagenet"  # imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1
    model.base_channels = 64  # channels of the stem; smaller for experiments on a CPU
    model.zero_init_residual = False
    model.head_hidden = 0  # width of the head's hidden layer; 0: as wide as the feature
    model.head_dim = 128
    model.head_batch_norm = False

    config.moco = moco = ml_collections.ConfigDict()
    moco.queue_size = 65536
    moco.momentum = 0.999  # of the key encoder
    moco.temperature = 0.2

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
    swav.queue_length = 0  # older embeddings that take part in Sinkhorn-Knopp, a multiple of the batch size; 0: none
    swav.queue_start_epoch = 0  # from 0
    swav.freeze_steps = 0  # steps in which the prototypes stay as they are

    config.views = views = ml_collections.ConfigDict()
    views.alpha1 = 0.0  # weight of the adversarial loss (equation 10)
    views.alpha2 = 0.0  # weight of the cut-mixed loss
    views.alpha3 = 0.0  # weight of the loss of cut-mixed adversarial views (Fig. 2's "CmxA")
    views.epsilon = 1.0  # radius of the attack, in grey levels of 255
    views.step_size = 1.0  # eta of equation 6, in grey levels
    views.steps = 1
    views.norm = "linf"  # linf or l2
    views.random_start = False
    views.attack_branch = "auxiliary"  # BatchNorm set used while making the attack: auxiliary or main
    views.share_gradient = True  # with main: take the attack's first gradient from the clean backward pass
    views.cutmix_alpha = 5.0
    views.cutmix_beta = 3.0
    views.cutmix_one_box = False  # one box for the whole batch instead of one per crop

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.name = "sgd"  # sgd or larc
    optimizer.learning_rate = 0.03
    optimizer.momentum = 0.9
    optimizer.weight_decay = 1e-4  # on all parameters, BatchNorm and biases included
    optimizer.trust_coefficient = 0.001  # larc
    optimizer.schedule = (
        "epoch_cosine"  # epoch_cosine: changes once per epoch, no warm-up; cosine: per step, with warm-up
    )
    optimizer.final_learning_rate = 0.0  # cosine
    optimizer.warmup_epochs = 0  # cosine
    optimizer.warmup_start = 0.0  # cosine

    config.data = data = ml_collections.ConfigDict()
    data.source = "tfds:imagenet2012:train"  # tfds:NAME[/CONFIG][:SPLIT], folder:DIR, arrays:FILE.npz, shapes
    data.eval_source = ""  # held-out examples for the online kNN; empty: leave-one-out on the training images
    data.limit = 0  # use so many examples, spread evenly over the data set; 0: all
    data.shapes_size = 32  # shapes: side in pixels
    data.shapes_count = 10_000  # shapes: number of images
    data.num_crops = (2,)  # per resolution; MoCo's key is the last crop of the first
    data.crop_size = (224,)
    data.min_scale = (0.2,)  # share of the image's area
    data.max_scale = (1.0,)
    data.on_device = False  # keep the whole data set on each device and cut crops there (small images of one size)
    data.max_bad_fraction = 0.001  # more unreadable images than this stop the run
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
    knn.every_epochs = 10  # online kNN accuracy when there are labels; 0: never
    knn.neighbours = 20
    knn.temperature = 0.07
    knn.train_limit = 20_000  # examples in the bank; 0: all
    knn.test_limit = 5_000
    knn.resize = 256  # short side
    knn.crop = 224  # centre crop

    config.linear = linear = ml_collections.ConfigDict()
    linear.at_end = False  # fit a linear probe on the kNN's examples when pre-training ends
    linear.regularization = 1e-4  # of multinomial logistic regression on standardised features

    config.runtime = runtime = ml_collections.ConfigDict()
    runtime.num_devices = 0  # 0: all
    runtime.microbatches = 1  # sequential parts of a step: less memory, the same result
    runtime.workers = 0  # input worker processes; 0: threads of this process
    runtime.threads = 2  # of this process, when workers is 0
    runtime.prefetch = 4  # batches read ahead by all workers together
    runtime.data_dir = ""  # where tfds data sets are, and what relative paths start from
    runtime.log_every = 50  # steps
    runtime.checkpoint_every = 0  # steps; 0: once per epoch
    runtime.keep_last = 2  # checkpoints
    runtime.keep_every = 0  # epochs: each k-th epoch's checkpoint stays for ever; 0: none
    runtime.writer = "tensorboardX"  # tensorboardX or clu (needs TensorFlow)
    return config


def hard_examples(
    config: ml_collections.ConfigDict, alpha1: float = 1.0, alpha2: float = 0.0
) -> ml_collections.ConfigDict:
    """Turn a plain recipe into HEXA: the weights of equation 10, everything else as it is."""
    config.views.alpha1, config.views.alpha2 = alpha1, alpha2
    return config


def deepcluster(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """DeepCluster-v2's recipe at B = 256: head, augmentation, BatchNorm and LARC of facebookresearch/swav."""
    config.method = "deepcluster"
    config.bn_group_size = 256  # min(512, batch_size)
    config.model.head_hidden = 2048
    config.model.head_batch_norm = True
    config.data.min_scale = (0.08,)
    config.data.pixel_std = (0.228, 0.224, 0.225)  # sic: not .229
    config.augment.brightness = config.augment.contrast = config.augment.saturation = 0.8
    config.augment.hue = 0.2
    config.optimizer.name = "larc"
    config.optimizer.learning_rate = 0.6
    config.optimizer.final_learning_rate = 0.0006
    config.optimizer.weight_decay = 1e-6
    config.optimizer.schedule = "cosine"
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
    config.knn.resize = config.knn.crop = 32
    config.knn.neighbours = 200
    config.knn.temperature = 0.1
    config.knn.train_limit = 0
    config.knn.test_limit = 0
    config.linear.at_end = True
    return config
