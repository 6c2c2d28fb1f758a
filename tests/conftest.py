"""Strict JAX settings for every test: 8 CPU devices, no rank promotion, no reused keys, a persistent compilation cache."""

import atexit
import os
import pathlib
import shutil
import tempfile

os.environ["EPATH_USE_TF"] = "false"  # before anything imports epath: see hexa_jax/storage/gcs.py
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The same HLO with quicker code generation: compile time is most of this suite.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
)

import jax
import pytest

# What the test processes share; xdist's workers inherit the variable.
if "HEXA_TESTS_SHARED" not in os.environ:
    os.environ["HEXA_TESTS_SHARED"] = tempfile.mkdtemp(prefix="hexa_tests_")
    atexit.register(shutil.rmtree, os.environ["HEXA_TESTS_SHARED"], ignore_errors=True)

CACHE = pathlib.Path(__file__).resolve().parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))  # child processes share it too
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def x64():
    """float64 arithmetic inside one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def hexa_data():
    """The folder with real images; tests that need it are skipped where HEXA_DATA does not name one."""
    folder = os.environ.get("HEXA_DATA")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("HEXA_DATA does not name a folder with the real image packs")
    return pathlib.Path(folder)


# Files of many minutes, longest first: workers take files in this order, and none is left alone with one at the end.
LONG = (
    "test_parallel",
    "test_hosts",
    "test_cli",
    "test_resume",
    "test_experiments",
    "test_configs",
    "test_bad_input",
    "test_objective",
    "test_notebooks",
    "test_hlo",
    "test_official_data",
    "test_evaluations",
)


# Files that `make test-fast` leaves out: each took more than 25 s of the whole suite's 6,650 (2026-12-01, two slow cores).
LEFT_OUT_BY_FAST = frozenset(
    [
        "test_bad_input",
        "test_byol",
        "test_checkpoint",
        "test_cli",
        "test_compare_with_plain",
        "test_configs",
        "test_detection_agreement",
        "test_detection_boxes",
        "test_detection_data",
        "test_detection_roi_align",
        "test_detection_task",
        "test_embed",
        "test_evaluations",
        "test_experiments",
        "test_export_runtimes",
        "test_finetune",
        "test_golden_kmeans",
        "test_golden_losses",
        "test_golden_methods",
        "test_golden_views",
        "test_hlo",
        "test_hosts",
        "test_image_size",
        "test_initial_weights",
        "test_input",
        "test_linear_sgd",
        "test_memory",
        "test_model",
        "test_notebooks",
        "test_objective",
        "test_official_data",
        "test_parallel",
        "test_pcl",
        "test_peer",
        "test_pipeline",
        "test_prepare",
        "test_preset_data",
        "test_remote",
        "test_resume",
        "test_robustness",
        "test_statistics",
        "test_study",
        "test_supervised",
        "test_tfds",
        "test_training",
        "test_transfer",
        "test_views",
        "test_voc",
        "test_weights",
        "test_wheel",
    ]
)


def pytest_collection_modifyitems(items):
    """Put the long files first, and mark what `make test-fast` leaves out."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))  # stable: the rest stays as it was
    for item in items:
        if item.path.stem in LEFT_OUT_BY_FAST:
            item.add_marker(pytest.mark.long)
