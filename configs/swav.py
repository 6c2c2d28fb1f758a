"""SwAV, ResNet-50, ImageNet.

Command:   python -m hexa_jax.main --config=configs/swav.py --workdir=DIR
Arguments: crops=8 (2x224 + 6x96), 6 (2x160 + 4x96) or 2 (2x224); batch=4096 or 256; epochs=200 (or
    100, 400, 800):
           --config=configs/swav.py:batch=256 is the recipe for one machine, with a queue
Hardware:  64 V100 in the reference at B = 4096, 4 at B = 256; fewer devices take --config.runtime.microbatches.
Time:      not measured here.
Expected:  ImageNet linear top-1, 8 crops: 73.9 (B = 4096, 200 epochs), 75.3 (800), 72.7 (B = 256, 200) (the paper, Table 1).

Numbers: scripts of facebookresearch/swav. B = 4096: lr 4.8 to 0.0048, 10 epochs of warm-up from
0.3, no queue, prototypes frozen for 313 steps. B = 256: lr 0.6 to 0.0006, no warm-up, queue of 3840
from epoch 15 on, prototypes frozen for 5005 steps, and BatchNorm over the whole batch. Sinkhorn 3
iterations at epsilon 0.05, 3000 prototypes, temperature 0.1, weight decay 1e-6.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, crops=8, batch=4096, epochs=200)
    config = common.multi_crop(common.swav(common.get_config()), choice.crops)
    config.epochs = choice.epochs
    common.larc_batch(config, choice.batch)
    if choice.batch == 256:
        config.swav.queue_length, config.swav.queue_start_epoch, config.swav.freeze_steps = 3840, 15, 5005
    else:
        config.swav.freeze_steps = 313
    return common.on_imagenet(config)
