"""MoCo-v2 on CIFAR-10 or any set of 32-pixel images: ResNet-18, cifar stem, no blur, data on the device.

Command:   python -m hexa_jax.main --config=configs/cifar10_moco_v2.py --workdir=DIR
           other data: --config.data.source=arrays:FILE.npz --config.data.eval_source=arrays:TEST.npz (or folder:DIR)
Arguments: epochs=200; scheme= (hard examples, as in Fig. 2: std+adv, std+cmx, ...)
Hardware:  one accelerator. On a CPU use fewer channels and a part of the data (docs/results.md has such runs).
Time:      not measured on an accelerator.
Expected:  no published number for exactly this recipe; runs on parts of the data are in docs/results.md. Close to it: kNN 83.8
           to 85.0 after 200 epochs in the benchmark of lightly-ai/lightly, whose loss is symmetric.

Numbers: B = 512, lr 0.06, weight decay 5e-4, cosine, queue 4096, momentum 0.99 and temperature 0.1 are usual for MoCo at this size.
"""

from configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=200, scheme="")
    config = common.benchmark_sgd(common.small_images(common.get_config()), 0.06)
    config.batch_size = 512
    config.shuffle_block = 512
    config.moco.queue_size = 4096
    config.moco.momentum = 0.99
    config.moco.temperature = 0.1
    config.optimizer.schedule = "cosine"
    config.epochs, config.scheme = choice.epochs, choice.scheme
    return config
