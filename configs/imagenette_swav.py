"""SwAV on Imagenette at 160 pixels or any small set of photographs: ResNet-18, crops of 128 pixels.

Command:   python -m hexa_jax.main --config=configs/imagenette_swav.py --workdir=DIR
           other data: --config.data.source=folder:TRAIN --config.data.eval_source=folder:VAL
Arguments: epochs=200; scheme= (hard examples, as in Fig. 2: std+adv, std+cmx, ...)
Hardware:  one accelerator.
Time:      not measured.
Expected:  kNN 86.1 after 200 epochs, 90.2 after 800 in the benchmark of lightly-ai/lightly (May 2023; 2x128 + 6x64 crops, other
           optimiser). The rest is ours: configs/swav.py with a head and prototypes for a small data
           set. Nothing measured here yet.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=200, scheme="")
    config = common.imagenette(common.swav(common.get_config()))
    data = config.data
    data.num_crops, data.crop_size, data.min_scale, data.max_scale = (2, 6), (128, 64), (0.14, 0.05), (1.0, 0.14)
    config.model.head_hidden = 512
    config.swav.num_prototypes = 512
    config.epochs, config.scheme = choice.epochs, choice.scheme
    return config
