"""The documentation site: it builds without a warning, and its reference has every key and every recipe."""

import os
import re
import subprocess
import sys

import pytest
from command_line import REPOSITORY
from ml_collections import ConfigDict

from configs.common import get_config
from hexa_jax.data.sources import SOURCES
from hexa_jax.storage.workdir import flatten


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_config_key_is_on_the_reference_page(site):
    page = (site / "reference" / "config" / "index.html").read_text()
    told = set(re.findall(r"<td><code>([\w.]+)</code></td>", page))
    blocks = get_config().views.items()
    views = {f"views.{name}" for name, block in blocks if isinstance(block, ConfigDict)}
    for key in flatten(get_config().to_dict()):
        group = key.rpartition(".")[0]
        assert key in told or group in views or group == "rotation", key
    assert views <= told


def test_every_recipe_is_listed_with_its_first_sentence(site):
    page = (site / "reference" / "recipes" / "index.html").read_text()
    for path in REPOSITORY.glob("configs/**/*.py"):
        if path.stem not in ("__init__", "common"):
            assert re.search(rf"<td><code>{path.stem}</code></td>\s*<td>\S", page), path


def test_every_kind_of_source_is_listed(site):
    page = (site / "reference" / "sources" / "index.html").read_text()
    for kind in SOURCES.values():
        assert f"<td><code>{kind.usage}</code></td>" in page, kind.usage


def test_the_public_functions_are_documented(site):
    page = (site / "reference" / "python" / "index.html").read_text()
    for name in (
        "hexa_jax.load",
        "hexa_jax.losses.info_nce",
        "hexa_jax.kmeans.spherical_kmeans",
        "hexa_jax.optim.larc",
    ):
        assert f'id="{name}"' in page, name
