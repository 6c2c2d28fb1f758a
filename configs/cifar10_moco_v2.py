"""MoCo-v2 on CIFAR-10 or any set of 32-pixel images: ResNet-18, cifar stem, no blur, data on the device.

Command:   python -m hexa_jax.main --config=configs/cifar10_moco_v2.py --workdir=DIR
           other data: --config.data.source=arrays:FILE.npz
           --config.data.eval_source=arrays:TEST.npz (or folder:DIR)
Arguments: epochs=200; scheme= (hard examples, as in Fig. 2: std+adv, std+cmx, ...)
Hardware:  one accelerator. On a CPU use fewer channels and a part of the data (docs/results.md has such runs).
Time:      not measured on an accelerator.
Expected:  close to kNN 82.6 after 200 epochs, 88.7 after 800: the CIFAR-10 demo of facebookresearch/moco, whose recipe this is.
           Runs on parts of the data are in docs/results.md; nothing of this length has been run
           here yet.

Numbers: colab/moco_cifar10_demo.ipynb of facebookresearch/moco with its asymmetric loss: B = 512,
SGD 0.06, weight decay 5e-4, cosine, queue 4096, momentum 0.99, temperature 0.1. Ours: MoCo-v2's
head with a hidden layer (the demo has a single linear one), crops from 20 % of the image (8 %),
BatchNorm over 32 images (64), a cosine per step (per epoch). With a symmetric loss, which sees
twice as many queries a step, the demo has 85.3 after 200 epochs, and the benchmark of
lightly-ai/lightly 83.8 (B = 128, lr 0.06) and 84.7 to 85.0 (B = 512, lr 0.24, queue 8192): these
are other recipes.
"""

from hexa_jax.configs import common


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
