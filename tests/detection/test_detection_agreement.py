"""The JAX detector against `torch_faster_rcnn`, which equals torchvision's: from the same weights and images, the same numbers."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_weights import draw_images

from hexa_jax.detection import targets
from hexa_jax.detection.detector import Detector
from hexa_jax.detection.names import detector_from_torchvision, detector_to_torchvision
from hexa_jax.detection.rcnn import FasterRCNN, NormModes
from hexa_jax.models.resnet import make_resnet
from hexa_jax.models.weights import WeightsError

torch = pytest.importorskip("torch", reason="compares with PyTorch")
import torch_faster_rcnn as reference  # noqa: E402

CLASSES, DIM, HIDDEN = 4, 16, 24
PADDED, SIZES = (128, 160), [(128, 150), (101, 160)]
LIMITS = 120, 100  # proposals before and after suppression
ANCHORS = (16.0, 32.0, 64.0, 96.0, 128.0)
REGIONS = 48
TOLERANCE = 1e-3
BOXES = [[[12.0, 20, 70, 90], [40, 5, 140, 60], [90, 70, 149, 120]], [[30, 10, 60, 95]]]
LABELS = [[0, 2, 3], [1]]


def close(ours, theirs, name):
    np.testing.assert_allclose(ours, np.asarray(theirs), atol=TOLERANCE, rtol=TOLERANCE, err_msg=name)


@pytest.fixture(scope="module")
def theirs():
    settings = reference.Settings(tuple(map(int, ANCHORS)), (LIMITS[0],) * 2, (LIMITS[1],) * 2)
    model = reference.TorchFasterRCNN(CLASSES, 50, 8, DIM, HIDDEN, settings=settings)
    return reference.draw_weights(model)


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(draw_images(PADDED, SIZES))


@pytest.fixture(scope="module")
def arrays(theirs):
    return {name: value.detach().numpy() for name, value in theirs.state_dict().items()}


def make_ours(arrays, epsilon=1e-5, dtype=jnp.float32):
    """Ours takes pixels: with mean 0 and deviation 1, those are the normalised images."""
    resnet = make_resnet("resnet50", 8, dtype=dtype)
    network = Detector(resnet, CLASSES, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), dim=DIM, hidden=HIDDEN, dtype=dtype)
    image, size = jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64, jnp.int32)
    like = jax.eval_shape(lambda: network.init(jax.random.key(0), image, size))
    model = FasterRCNN(network, ANCHORS, LIMITS, LIMITS, REGIONS)
    return model, detector_from_torchvision(arrays, like, epsilon)


@pytest.fixture(scope="module")
def ours(arrays):
    return make_ours(arrays)


def as_input(images):
    return jnp.asarray(images.numpy().transpose(0, 2, 3, 1)), jnp.asarray(SIZES, jnp.int32)


def test_inference_step_by_step(theirs, ours, images):
    expected = theirs.infer(images, SIZES)
    model, variables = ours
    pixels, sizes = as_input(images)
    mode = NormModes().backbone

    @jax.jit
    def run(variables):
        maps = model.network.apply(variables, pixels, sizes, mode, mode, method=Detector.pyramid)
        predicted = model.network.apply(variables, maps, method=Detector.proposals)
        return maps, predicted, model.propose(predicted, PADDED, sizes, LIMITS), model.detect(variables, pixels, sizes)

    maps, predicted, proposals, detected = run(variables)
    for level in range(5):
        close(maps[level].transpose(0, 3, 1, 2), expected.pyramid[level], f"pyramid {level}")
        close(predicted[level][0], expected.objectness[level], f"objectness {level}")
        close(predicted[level][1], expected.deltas[level], f"deltas {level}")
    for image in range(len(SIZES)):
        count = len(expected.proposals[image])
        assert int(proposals.valid[image].sum()) == count > 50
        close(proposals.scores[image][:count], expected.proposal_scores[image], "proposal scores")
        close(proposals.boxes[image][:count], expected.proposals[image], "proposals")
        wanted = expected.detections[image]
        found = detected.labels[image] >= 0
        assert int(found.sum()) == len(wanted.labels) > 10 and len(set(wanted.labels.tolist())) > 1
        close(detected.scores[image][found], wanted.scores, "scores")
        close(detected.boxes[image][found], wanted.boxes, "boxes")
        assert (np.asarray(detected.labels[image][found]) + 1).tolist() == wanted.labels.tolist()


def test_pooled_regions_and_class_scores(theirs, ours, images):
    model, variables = ours
    expected = theirs.infer(images, SIZES)
    count = min(len(boxes) for boxes in expected.proposals)
    boxes = torch.stack([boxes[:count] for boxes in expected.proposals])
    pooled = theirs.pool(expected.pyramid, list(boxes))
    logits, deltas = theirs.box_outputs(pooled)
    maps = [jnp.asarray(level.numpy().transpose(0, 2, 3, 1)) for level in expected.pyramid]
    mine = jax.jit(model.pool)(maps, jnp.asarray(boxes.numpy()))
    flat = mine.reshape(-1, *mine.shape[2:])
    close(flat.transpose(0, 3, 1, 2), pooled, "pooled")
    scores, offsets = model.network.apply(variables, flat, NormModes().head, method=Detector.regions)
    close(scores, logits.detach(), "class logits")
    close(offsets.reshape(len(flat), -1), deltas.detach(), "box deltas")


def by_index(key, labels, count, positive_fraction):
    """The first positives and negatives instead of random ones."""
    del key
    positive = (labels == 1) & (jnp.cumsum(labels == 1) <= int(count * positive_fraction))
    negative = (labels == 0) & (jnp.cumsum(labels == 0) <= count - jnp.sum(positive))
    return positive, negative


def first(labels, count, fraction, positive):
    chosen = torch.where(positive(labels))[0][: int(count * fraction)]
    return chosen, torch.where(labels == 0)[0][: count - len(chosen)]


def test_losses_and_their_gradients(theirs, arrays, images, monkeypatch, x64):
    """In float64: in float32 a rectifier at a rounding error of zero may open on one side only, worth a thousandth."""
    theirs, images = copy.deepcopy(theirs).double(), images.double()
    truths = [
        (torch.tensor(boxes, dtype=torch.float64), torch.tensor(labels) + 1)
        for boxes, labels in zip(BOXES, LABELS, strict=True)
    ]
    anchors = functools.partial(first, count=256, fraction=0.5, positive=lambda labels: labels == 1)
    regions = functools.partial(first, count=REGIONS, fraction=0.25, positive=lambda labels: labels > 0)
    expected, _ = theirs.losses(images, SIZES, truths, anchors, lambda labels: torch.cat(regions(labels)))
    sum(expected.values()).backward()

    monkeypatch.setattr(targets, "sample", by_index)
    model, variables = make_ours(arrays, dtype=jnp.float64)
    variables = jax.tree.map(lambda value: jnp.asarray(value, jnp.float64), variables)
    pixels, sizes = as_input(images)
    boxes = np.zeros((2, 5, 4))
    labels = np.full((2, 5), -1, np.int32)
    for image in range(2):
        boxes[image, : len(BOXES[image])], labels[image, : len(LABELS[image])] = BOXES[image], LABELS[image]

    def loss(params):
        sums, _ = model.loss_sums(
            {**variables, "params": params},
            jax.random.split(jax.random.key(0)),
            pixels,
            sizes,
            boxes,
            labels,
            NormModes(),
        )
        means = sums.means()
        return sum(means.values()), means

    gradients, means = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    names = {"loss_rpn_box": "loss_rpn_box_reg", "loss_box": "loss_box_reg"}
    for name, value in means.items():
        wanted = expected[names.get(name, name)].item()
        assert wanted > 0
        np.testing.assert_allclose(float(value), wanted, rtol=1e-9, err_msg=name)
    named = detector_to_torchvision({**variables, "params": gradients})
    for name, parameter in theirs.named_parameters():
        wanted = parameter.grad.numpy()
        # Names come with float32.
        np.testing.assert_allclose(named[name], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max(), err_msg=name)


def test_names_and_shapes_survive_the_way_there_and_back(arrays, ours):
    back = detector_to_torchvision(ours[1])
    assert back.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_a_batch_norm_without_epsilon(arrays, images):
    """As torchvision's COCO_V1 has it."""
    other = reference.TorchFasterRCNN(CLASSES, 50, 8, DIM, HIDDEN, eps=0.0)
    other.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    model, variables = make_ours(arrays, epsilon=0.0)
    pixels, sizes = as_input(images)
    mode = NormModes().backbone
    maps = jax.jit(lambda v: model.network.apply(v, pixels, sizes, mode, mode, method=Detector.pyramid))(variables)
    with torch.no_grad():
        close(maps[0].transpose(0, 3, 1, 2), other.pyramid(images)[0], "pyramid")


def test_other_weights_are_refused_by_name(arrays):
    without = {name: value for name, value in arrays.items() if name != "rpn.head.bbox_pred.bias"}
    with pytest.raises(WeightsError, match=r"rpn\.head\.bbox_pred\.bias is missing"):
        make_ours(without)
    fewer = arrays | {"roi_heads.box_predictor.cls_score.weight": np.zeros((3, HIDDEN), np.float32)}
    with pytest.raises(WeightsError, match=r"cls_score\.weight becomes \(24, 3\), not \(24, 5\)"):
        make_ours(fewer)
