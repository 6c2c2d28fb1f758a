"""Libraries on top of PyTorch for tests: imported when a test runs, and their networks with weights drawn by name."""

import functools

import pytest
from make_torch_goldens import draw_all

REASON = "needs {0}, which .ci/run installs beside PyTorch: pip install {0}"


@functools.cache
def library(name):
    """The module; the test is skipped where it or PyTorch is missing.

    PyPI's torchvision is built for PyTorch with CUDA. Beside a CPU build its operators cannot be loaded, and importing it
    fails at the first that it describes to PyTorch. ResNets need none of them: declared, they do no harm. Not at the top of
    a file: tests that do need them ask at their import whether torchvision works.
    """
    torch = pytest.importorskip("torch", reason=REASON.format("torch"))
    try:
        return pytest.importorskip(name, reason=REASON.format(name))
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for operator in ("nms", "qnms"):
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        _declared[-1].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip(name, reason=REASON.format(name))


_declared = []  # a declaration lasts as long as its object


def with_drawn_weights(module):
    """A PyTorch module in evaluation mode, each of its tensors drawn by name; statistics and scales are no zeros and ones."""
    import torch

    arrays = draw_all({name: value.shape for name, value in module.state_dict().items()})
    module.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    return module.eval()


def features_of(module, images):
    """What a module makes of normalised images [N, H, W, 3], as NumPy."""
    import torch

    with torch.no_grad():
        return module(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).numpy()
