"""SimSiam, ResNet-50, ImageNet, two crops: BYOL whose target is the network itself.

Command:   python -m hexa_jax.main --config=configs/simsiam.py --workdir=DIR
Arguments: epochs=100 (or 200, 400, 800); batch=512: the learning rate follows it
Hardware:  8 V100 in the reference. BatchNorm is over the whole batch.
Time:      not measured here.
Expected:  67.7 ImageNet linear top-1 after 100 epochs (the paper's Table 1, the row whose predictor's learning rate decays
           too). The reference keeps the predictor's learning rate constant, which is left out here:
           68.1 after 100 epochs, 70.0 after 200, 70.8 after 400, 71.3 after 800 (the paper's Tables
           1 and 4).

Numbers: facebookresearch/simsiam and the paper: SGD 0.05 per 256 images, weight decay 1e-4 on all
parameters, cosine per epoch without warm-up, projector of 3 layers of 2048 with BatchNorm behind
each (the last without scale and bias), predictor 2048 -> 512 -> 2048, residual branches that start
at zero, MoCo-v2's augmentation. Ours: layers in front of a BatchNorm keep a bias, which it takes
away again; BatchNorm's moments are those of both crops together; targets cost one more forward
pass.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=100, batch=512)
    config = common.get_config()  # crops and colors are MoCo-v2's
    config.method = "byol"
    config.byol.simsiam = True
    config.byol.predictor_hidden = 512
    config.epochs = choice.epochs
    config.batch_size = config.bn_group_size = choice.batch
    config.model.head_layers, config.model.head_hidden, config.model.head_dim = 3, 2048, 2048
    config.model.head_batch_norm = config.model.head_output_norm = True
    config.model.zero_init_residual = True
    config.optimizer.learning_rate = 0.05 * choice.batch / 256
    return common.on_imagenet(config)
