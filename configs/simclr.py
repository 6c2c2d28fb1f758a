"""SimCLR, ResNet-50, ImageNet, two crops, B = 4096.

Command:   python -m hexa_jax.main --config=configs/simclr.py --workdir=DIR
Arguments: epochs=100 (or 1000); batch=4096: the learning rate follows it, 0.3 for 256 images
Hardware:  32 TPU v3 in the reference; fewer devices take --config.runtime.microbatches, but BatchNorm is over the whole batch:
           a smaller --config.bn_group_size goes with them, and is then another recipe.
Time:      not measured here (6 hours on 32 TPU v3 for 100 epochs, README of google-research/simclr).
Expected:  64.5 ImageNet linear top-1 after 100 epochs (README of google-research/simclr), 69.3 after 1000 (the paper, Table 1).

Numbers: that README's command and the defaults of its flags: LARS (trust 0.001; BatchNorm and
biases neither decayed nor adapted), lr 0.3 per 256 images, 10 epochs of warm-up, weight decay 1e-6,
temperature 0.1, BatchNorm over all devices, colour strength 1, residual branches that start at
zero, pixels in [0, 1] without normalisation. Ours: the head has one hidden layer, as in the SimCLR
paper (the reference's current code has two, each followed by BatchNorm), and crops are resized
bilinearly.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=100, batch=4096)
    config = common.simclr(common.get_config())
    config.epochs = choice.epochs
    config.batch_size = config.bn_group_size = choice.batch
    config.model.zero_init_residual = True
    config.data.pixel_mean, config.data.pixel_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    config.optimizer.name = "lars"
    config.optimizer.learning_rate = 0.3 * choice.batch / 256
    config.optimizer.weight_decay = 1e-6
    config.optimizer.schedule = "cosine"
    # runs of a few epochs have no room for ten
    config.optimizer.warmup_epochs = min(10, config.epochs // 2)
    return common.on_imagenet(config)
