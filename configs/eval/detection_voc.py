"""Object detection on Pascal VOC: Faster R-CNN with a ResNet-50 FPN, fine-tuned from a pre-trained backbone.

Command:   python -m hexa_jax.main --config=configs/eval/detection_voc.py --config.checkpoint=WORKDIR --workdir=DIR
               --config.data.source=voc:VOCDEVKIT/VOC2007:trainval+voc:VOCDEVKIT/VOC2012:trainval
               --config.data.eval_source=voc:VOCDEVKIT/VOC2007:test
           (or tfds:voc/2007:train+validation+tfds:voc/2012:train+validation and tfds:voc/2007:test)
Arguments: recipe=paper, detectron2 (its VOC FPN schedule) or scratch (nothing frozen, BatchNorm
    everywhere)
Hardware:  accelerators.
Time:      not measured.
Expected:  AP 57.1, AP50 82.4, AP75 63.8 for HEXA_MoCo after 200 epochs (the paper, Table 4). The 57.0 / 82.4 / 63.6 of MoCo-v2 with
           which the paper compares were measured with another detector (C4).

Numbers: the paper's Appendix B (convolutions and BatchNorm of the backbone frozen, batch 8,
learning rate 0.05, x0.1 after 12 of 15 epochs); warm-up, sizes of images and the other recipe:
detectron2's configs/PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml.
"""

import ml_collections

from hexa_jax.configs import common
from hexa_jax.configs.eval import common as evaluation


def get_config(text=None):
    """The protocol."""
    choice = common.arguments(text, recipe="paper")
    config = evaluation.get_config("detection")

    data = config.data
    # of images of one size, with one label
    for name in ("resize", "crop", "squash", "list", "labels"):
        del data[name]
    # (short, long) sides that images are padded to, multiples of 32; each lying and standing is a
    # compiled program.
    data.canvases = ((608, 1024), (800, 1344))
    data.short_sides = tuple(range(480, 801, 32))  # of images in training, drawn for each batch
    data.eval_short_side = 800
    data.long_limit = 1333  # images whose long side would exceed it are made smaller
    data.flip = 0.5  # probability of mirroring an image in training
    data.max_boxes = 100  # of an image in training: the largest; padding up to it

    config.runtime.batch_size = 16  # images of a forward pass in the evaluation

    # instead of `checkpoint`: weights of a whole detector by torchvision's names, to begin with
    config.detector = ""
    config.epochs = 15  # 0, with config.detector: only test
    config.steps = 0  # steps in all, instead of epochs
    config.batch_size = 8
    config.eval_every_epochs = 0  # tests during training; 0: only at the end

    config.model = model = ml_collections.ConfigDict()
    # of the backbone's stem and four stages, from the first, how many are not trained
    model.frozen_stages = 5
    # the backbone's: frozen (running statistics, scale and bias fixed) or synchronised
    model.batch_norm = "frozen"
    # that config.detector was trained with; torchvision's COCO_V1: 0
    model.batch_norm_epsilon = 1e-5
    model.dim = 256  # channels of the pyramid
    model.hidden = 1024  # width of the box head's two hidden layers
    model.pyramid_norm = False  # BatchNorm behind each convolution of the pyramid, synchronised
    model.head_norm = False  # and behind the two hidden layers of the box head
    model.anchor_sizes = (32.0, 64.0, 128.0, 256.0, 512.0)  # pixels, one per level
    # best anchors of a level before suppression, and boxes of an image after it
    model.train_proposals = (2000, 2000)
    model.test_proposals = (1000, 1000)
    model.regions = 512  # sampled from an image's proposals for the box head's losses

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.learning_rate = 0.05
    optimizer.momentum = 0.9
    optimizer.weight_decay = 1e-4
    optimizer.milestones = (
        12,
    )  # epochs, or steps where config.steps is set, at which the learning rate is multiplied by `decay`
    optimizer.decay = 0.1
    # the learning rate grows linearly from `warmup_start` times itself
    optimizer.warmup_steps = 100
    optimizer.warmup_start = 0.001
    if choice.recipe == "detectron2":
        config.steps, config.batch_size = 18_000, 16
        model.frozen_stages = 2
        optimizer.learning_rate, optimizer.milestones = 0.02, (12_000, 16_000)
    elif choice.recipe == "scratch":
        model.frozen_stages, model.batch_norm = 0, "synchronised"
        model.pyramid_norm = model.head_norm = True
        optimizer.learning_rate = 0.02
    elif choice.recipe != "paper":
        raise ValueError(f"recipe={choice.recipe} is not known: use paper, detectron2 or scratch")
    return config
