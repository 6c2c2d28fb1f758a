"""The detector against torchvision itself, for whoever has it: `pip install torch torchvision`.

The project does not need torchvision. Elsewhere `torch_faster_rcnn.py` stands for it, and this file is why that may be
trusted: the same weights and images go through both.
"""

import detection_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_weights import draw_images

from hexa_jax.detection.detector import Detector
from hexa_jax.detection.names import detector_from_torchvision
from hexa_jax.detection.rcnn import FasterRCNN as RCNN
from hexa_jax.models.resnet import make_resnet

try:
    import torch
    from torchvision import ops
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection._utils import Matcher
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
except (ImportError, OSError, RuntimeError) as error:  # a build for another PyTorch fails in each of these ways
    pytest.skip(f"torchvision cannot be imported: {error}", allow_module_level=True)
else:
    from torch_boxes import levels_of, match, nms, roi_align
    from torch_faster_rcnn import Settings, TorchFasterRCNN, draw_weights

CLASSES = 5
PADDED, SIZES = (128, 192), [(118, 192), (128, 150), (128, 192)]  # height, width
TRUTHS = [  # the last image has none
    (torch.tensor([[10.0, 20, 90, 110], [70, 30, 190, 115], [15, 25, 40, 60]]), torch.tensor([1, 5, 2])),
    (torch.tensor([[0.0, 0, 149, 127]]), torch.tensor([3])),
    (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
]


def assert_close(result, expected, tolerance=1e-4):
    """Within `tolerance` of the largest value, of each number."""
    assert result.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * scale)


# torchvision's own numbers, where the best 100 detections decide; and smaller ones, where each limit and the score decide.
SETTINGS = {
    "default": Settings(),
    "small": Settings(before_nms=(300, 500), after_nms=(150, 250), score=0.8, detections=1000),
}


@pytest.fixture(scope="module")
def state():
    """Weights by torchvision's names."""
    return draw_weights(TorchFasterRCNN(CLASSES)).state_dict()


def our_model(state, settings=SETTINGS["default"]):
    model = TorchFasterRCNN(CLASSES, settings=settings)
    model.load_state_dict(state)
    return model


def their_model(state, settings=SETTINGS["default"]):
    """torchvision's detector with the same weights."""
    model = FasterRCNN(
        resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=5),
        num_classes=CLASSES + 1,
        rpn_pre_nms_top_n_test=settings.before_nms[0],
        rpn_pre_nms_top_n_train=settings.before_nms[1],
        rpn_post_nms_top_n_test=settings.after_nms[0],
        rpn_post_nms_top_n_train=settings.after_nms[1],
        box_score_thresh=settings.score,
        box_detections_per_img=settings.detections,
    )
    model.load_state_dict(state)  # strict: all names, and no other
    return model


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(draw_images(PADDED, SIZES))


# ---- Operations --------------------------------------------------------------------------------------------------------


def boxes_of(rng, count, low=-20, high=120):
    return torch.tensor(np.sort(rng.uniform(low, high, (count, 2, 2)), axis=1).reshape(count, 4), dtype=torch.float32)


def test_nms():
    rng = np.random.default_rng(0)
    for _ in range(20):
        boxes, scores = boxes_of(rng, 100), torch.tensor(rng.permutation(100) / 100, dtype=torch.float32)
        expected = ops.nms(boxes, scores, 0.5)
        assert nms(boxes, scores, 0.5).tolist() == expected.tolist()
        assert np.flatnonzero(reference.nms(boxes, scores, 0.5)).tolist() == sorted(expected.tolist())


@pytest.mark.parametrize("low_quality", [False, True])
def test_match(low_quality):
    rng = np.random.default_rng(1)
    for _ in range(100):
        overlaps = rng.integers(0, 17, (4, 12)) / 20 * (rng.random((1, 12)) < 0.8)
        expected = Matcher(0.7, 0.3, low_quality)(torch.tensor(overlaps))
        assert match(torch.tensor(overlaps), 0.7, 0.3, low_quality).tolist() == expected.tolist()
        assert reference.match(overlaps, 0.7, 0.3, low_quality).tolist() == expected.tolist()


def test_roi_align():
    rng = np.random.default_rng(2)
    features = torch.tensor(rng.normal(size=(3, 12, 9)), dtype=torch.float32)
    boxes = torch.cat(
        [boxes_of(rng, 60), boxes_of(rng, 20, 30, 60), torch.tensor([[3.0, 3, 3, 3], [35.9, 47.9, 36, 48]])]
    )
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1)
    for aligned in (False, True):
        expected = ops.roi_align(features[None], rois, 7, 0.25, 2, aligned)
        by_loop = reference.roi_align(features.permute(1, 2, 0).numpy(), boxes.numpy(), 0.25, aligned=aligned)
        assert_close(torch.tensor(by_loop).permute(0, 3, 1, 2).float(), expected, 1e-5)
        if not aligned:
            assert_close(roi_align(features, boxes, 0.25), expected, 1e-5)


def test_each_region_is_read_from_its_level():
    rng = np.random.default_rng(3)
    pyramid = [torch.tensor(rng.normal(size=(2, 3, 512 // s, 640 // s)), dtype=torch.float32) for s in (4, 8, 16, 32)]
    squares = [[5.0, 5, 5 + side, 5 + side] for side in (0.001, 56, 111.9, 112, 223.9, 224, 447.9, 448, 500)]
    boxes = [boxes_of(rng, 40, -10, 640), torch.cat([boxes_of(rng, 20, 100, 200), torch.tensor(squares)])]
    assert set(levels_of(torch.cat(boxes)).tolist()) == {0, 1, 2, 3}
    pool = ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    expected = pool({str(level): features for level, features in enumerate(pyramid)}, boxes, [(512, 640), (500, 600)])
    assert_close(TorchFasterRCNN(1, 18, 4, 3, 4).pool(pyramid, boxes), expected)


@pytest.mark.parametrize(
    "size", [(375, 500), (500, 334), (97, 97), (281, 500), (333, 500), (100, 298), (20, 30), (1500, 900)]
)
def test_sizes_and_boxes_of_resized_images(size):
    transform = GeneralizedRCNNTransform(800, 1333, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).eval()
    box = torch.tensor([[1.0, 2, size[1] - 1.0, size[0]]])
    batch, targets = transform([torch.full((3, *size), 0.5)], [{"boxes": box}])
    content = reference.content_size(*size)
    assert batch.image_sizes == [content]
    assert batch.tensors.shape[-2:] == tuple(-(-side // 32) * 32 for side in content)
    assert not batch.tensors[..., content[0] :, :].any() and not batch.tensors[..., content[1] :].any()
    ratios = np.float32(content) / np.float32(size)
    np.testing.assert_array_equal(targets[0]["boxes"].numpy(), box.numpy() * ratios[[1, 0, 1, 0]])
    back = transform.postprocess([{"boxes": targets[0]["boxes"]}], batch.image_sizes, [size])[0]["boxes"]
    ratios = np.float32(size) / np.float32(content)
    np.testing.assert_array_equal(back.numpy(), targets[0]["boxes"].numpy() * ratios[[1, 0, 1, 0]])


# ---- The whole detector ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_detection_step_by_step(state, images, name):
    settings = SETTINGS[name]
    ours, theirs = our_model(state, settings).eval(), their_model(state, settings).eval()
    result = ours.infer(images, SIZES)
    batch = ImageList(images, SIZES)
    with torch.no_grad():
        features = theirs.backbone(images)
        logits, deltas = theirs.rpn.head(list(features.values()))
        anchors = theirs.rpn.anchor_generator(batch, list(features.values()))
        proposals, _ = theirs.rpn(batch, features)
        pooled = theirs.roi_heads.box_roi_pool(features, proposals, SIZES)
        class_logits, box_deltas = theirs.roi_heads.box_predictor(theirs.roi_heads.box_head(pooled))
        detections, _ = theirs.roi_heads(features, proposals, SIZES)
    assert list(features) == ["0", "1", "2", "3", "pool"]
    torch.testing.assert_close(torch.cat(ours.anchors(images, result.pyramid)), anchors[0], rtol=0, atol=0)
    for level, expected in enumerate(features.values()):
        assert_close(result.pyramid[level], expected)
        count, _, height, width = logits[level].shape
        assert_close(result.objectness[level].reshape(count, height, width, 3).permute(0, 3, 1, 2), logits[level])
        assert_close(result.deltas[level].reshape(count, height, width, 12).permute(0, 3, 1, 2), deltas[level])
    for got, expected in zip(result.proposals, proposals, strict=True):
        assert settings.after_nms[0] / 2 < len(expected) <= settings.after_nms[0]
        assert_close(got, expected)
    assert_close(result.pooled, pooled)
    assert_close(result.class_logits, class_logits)
    assert_close(result.box_deltas, box_deltas)
    for got, expected in zip(result.detections, detections, strict=True):
        assert len(expected["labels"]) > 5 and len(expected["labels"].unique()) > 1
        assert_close(got.boxes, expected["boxes"])
        assert_close(got.scores, expected["scores"])
        assert got.labels.tolist() == expected["labels"].tolist()


class Recorder:
    """A sampler of torchvision that remembers what it drew."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __call__(self, labels):
        self.drawn = self.sampler(labels)
        return self.drawn


def test_losses_and_gradients(state, images):
    torch.manual_seed(0)
    ours, theirs = our_model(state, SETTINGS["small"]), their_model(state, SETTINGS["small"])
    theirs.rpn.fg_bg_sampler = Recorder(theirs.rpn.fg_bg_sampler)
    theirs.roi_heads.fg_bg_sampler = Recorder(theirs.roi_heads.fg_bg_sampler)
    targets = [{"boxes": boxes, "labels": labels} for boxes, labels in TRUTHS]
    features = theirs.backbone(images)
    proposals, rpn_losses = theirs.rpn(ImageList(images, SIZES), features, targets)
    _, box_losses = theirs.roi_heads(features, proposals, SIZES, targets)
    expected = rpn_losses | box_losses
    rpn_samples = [
        tuple(torch.where(mask)[0] for mask in pair) for pair in zip(*theirs.rpn.fg_bg_sampler.drawn, strict=True)
    ]
    region_samples = [torch.where(a | b)[0] for a, b in zip(*theirs.roi_heads.fg_bg_sampler.drawn, strict=True)]
    assert all(len(positive) > 0 for positive, _ in rpn_samples[:2])

    losses, found = ours.losses(images, SIZES, TRUTHS, rpn_samples, region_samples)
    for got, wanted in zip(found, proposals, strict=True):
        assert len(wanted) == 250
        assert_close(got, wanted)
    assert losses.keys() == expected.keys() and all(loss > 0 for loss in expected.values())
    for name, loss in expected.items():
        assert_close(losses[name], loss.detach(), 1e-4)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        size = float(parameter.grad.abs().max())
        assert size > 0
        torch.testing.assert_close(
            gradients[name].grad,
            parameter.grad,
            rtol=0,
            atol=1e-3 * size,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# ---- The JAX detector --------------------------------------------------------------------------------------------------


def test_the_jax_detector(state, images):
    """Full width, torchvision's own limits: the same detections from the same weights."""
    theirs = their_model(state).eval()
    with torch.no_grad():
        features = theirs.backbone(images)
        proposals, _ = theirs.rpn(ImageList(images, SIZES), features)
        expected, _ = theirs.roi_heads(features, proposals, SIZES)
    network = Detector(make_resnet("resnet50"), CLASSES, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    image, size = jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64, jnp.int32)
    like = jax.eval_shape(lambda: network.init(jax.random.key(0), image, size))
    variables = detector_from_torchvision({name: value.numpy() for name, value in state.items()}, like)
    pixels = jnp.asarray(images.numpy().transpose(0, 2, 3, 1))
    detected = jax.jit(RCNN(network).detect)(variables, pixels, jnp.asarray(SIZES, jnp.int32))
    for image, wanted in enumerate(expected):
        found = np.asarray(detected.labels[image]) >= 0
        assert found.sum() == len(wanted["labels"]) > 10
        assert_close(torch.from_numpy(np.array(detected.scores[image][found])), wanted["scores"], 1e-3)
        assert_close(torch.from_numpy(np.array(detected.boxes[image][found])), wanted["boxes"], 1e-3)
        assert (np.asarray(detected.labels[image][found]) + 1).tolist() == wanted["labels"].tolist()
