"""Fine-tune the whole network on CIFAR-10 or CIFAR-100 resized to 224 pixels.

Command:   python -m hexa_jax.main --config=configs/eval/finetune_cifar.py --config.checkpoint=WORKDIR --workdir=DIR
Arguments: dataset=cifar10 (or cifar100); epochs=20
Hardware:  an accelerator.
Time:      not measured.
Expected:  96.1 for HEXA_MoCo and 97.2 for HEXA_DCluster on CIFAR-10, 81.3 and 84.4 on CIFAR-100, after 200 epochs (the paper,
           Table 5).

Numbers: the paper's Appendix C: Adamax, 20 epochs, batch 256, x0.1 at epochs 7 and 14 (the same
shares of other numbers of epochs), learning rates 0.0005, 0.001 and 0.01. It does not say how
images are augmented: none here, as in its linear probe of the same data (Appendix B).
"""

from hexa_jax.configs import common
from hexa_jax.configs.eval import common as evaluation


def get_config(text=None):
    """The protocol."""
    choice = common.arguments(text, dataset="cifar10", epochs=20)
    config = evaluation.get_config("finetune")
    config.data.source, config.data.eval_source = f"tfds:{choice.dataset}:train", f"tfds:{choice.dataset}:test"
    config.data.resize = config.data.crop = 224
    evaluation.finetuning(config, choice.epochs)
    config.optimizer.name = "adamax"
    config.optimizer.learning_rates = (0.0005, 0.001, 0.01)
    config.optimizer.milestones = common.milestones(choice.epochs, 35, 70)
    config.optimizer.decay = 0.1
    return config
