"""Object detection on Pascal VOC: Faster R-CNN with a ResNet-50 FPN, fine-tuned from a pre-trained backbone.

Command:   python -m hexa_jax.main --config=configs/eval/detection_voc.py --config.checkpoint=WORKDIR --workdir=DIR
               --config.data.source=voc:VOCDEVKIT/VOC2007:trainval+voc:VOCDEVKIT/VOC2012:trainval
               --config.data.eval_source=voc:VOCDEVKIT/VOC2007:test
           (or tfds:voc/2007:train+validation+tfds:voc/2012:train+validation and tfds:voc/2007:test)
Hardware:  accelerators.
Time:      not measured.

Numbers: sizes of images as in detectron2's recipes for VOC and torchvision's Faster R-CNN (short side 480, 512, ... 800 in training
and 800 in the test, long side at most 1333).
"""

from configs.eval import common as evaluation


def get_config():
    """The protocol."""
    config = evaluation.get_config("detection")
    config.batch_size = 16

    data = config.data
    for name in ("resize", "crop", "squash", "list"):  # of images of one size, with one label
        del data[name]
    # (short, long) sides that images are padded to, multiples of 32; each lying and standing is a compiled program.
    data.canvases = ((608, 1024), (800, 1344))
    data.short_sides = tuple(range(480, 801, 32))  # of images in training, drawn for each batch
    data.eval_short_side = 800
    data.long_limit = 1333  # images whose long side would exceed it are made smaller
    data.flip = 0.5  # probability of mirroring an image in training
    data.max_boxes = 100  # of an image in training: the largest; padding up to it

    config.runtime.batch_size = 16  # images of a forward pass in the evaluation

    # <<< model, losses, optimizer and schedule go here >>>
    return config
