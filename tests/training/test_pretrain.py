"""What pre-training says and checks before its first step."""

import logging

import pytest
from small import small_config

from hexa_jax.training import loop


@pytest.fixture
def no_run(monkeypatch):
    """The start of a run without the run itself."""

    class Nothing:
        def __init__(self, *_):
            pass

        def run(self):
            pass

        def close(self):
            pass

    for name in ("open_run", "LiveReport", "_Loop"):
        monkeypatch.setattr(loop, name, Nothing)
    monkeypatch.setattr(loop, "_finish", lambda *_: {})


def warnings_of(config, tmp_path, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        loop.pretrain(config, tmp_path)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "method, queue_size, warned",
    [("moco", 64, False), ("moco", 96, True), ("pcl", 96, True), ("simclr", 96, False)],
)
def test_a_queue_longer_than_the_data_is_told(method, queue_size, warned, no_run, tmp_path, caplog):
    sizes = {f"{name}.queue_size": queue_size for name in ("moco", "pcl")}
    config = small_config(method, precision="float32", **sizes)
    messages = warnings_of(config, tmp_path, caplog)
    if not warned:
        assert not messages
        return
    (line,) = messages
    assert line.startswith(f"{method}.queue_size=96 is more than the 70 images: ") and "\n" not in line
    assert "up to 2 earlier epochs" in line and line.endswith(f"such as --config.{method}.queue_size=64")
