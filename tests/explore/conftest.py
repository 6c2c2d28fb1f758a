"""What the tests of looking at collections share: a tiny network and a browser."""

import pytest

from hexa_jax.evals.backbone import random_backbone
from hexa_jax.export import export


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A weights file of a tiny network with random weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    export(random_backbone(0, "resnet10", "cifar", 4), "torchvision", path)
    return path


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; skips where none is installed."""
    from benchmarks.browser import Browser, find_program

    pytest.importorskip("aiohttp", reason="the DevTools protocol needs aiohttp")
    program = find_program()
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    browser = Browser(program)
    yield browser
    browser.close()
