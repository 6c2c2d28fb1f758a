"""SimCLR on Imagenette at 160 pixels or any small set of photographs: ResNet-18, crops of 128 pixels.

Command:   python -m hexa_jax.main --config=configs/imagenette_simclr.py --workdir=DIR
           other data: --config.data.source=folder:TRAIN --config.data.eval_source=folder:VAL
Arguments: epochs=200; scheme= (hard examples, as in Fig. 2: std+adv, std+cmx, ...)
Hardware:  one accelerator.
Time:      not measured.
Expected:  kNN 83.5 after 200 epochs, 88.9 after 800 in the benchmark of lightly-ai/lightly (May 2023), whose numbers these are:
           B = 256, SGD 0.06, weight decay 5e-4, temperature 0.5, colour strength 0.5. Nothing
           measured here yet.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=200, scheme="")
    config = common.benchmark_sgd(common.imagenette(common.simclr(common.get_config())), 0.06)
    config.bn_group_size = 256
    config.simclr.temperature = 0.5
    config.augment.brightness = config.augment.contrast = config.augment.saturation = 0.4
    config.augment.hue = 0.1
    config.epochs, config.scheme = choice.epochs, choice.scheme
    return config
