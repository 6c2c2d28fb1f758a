"""The progress bar: drawn on a terminal, silent elsewhere, never in the way of a line."""

import io
import logging

import pytest

from hexa_jax.core import console
from hexa_jax.core.progress_bar import CLEAR, WIDTH, ProgressBar, draw


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("hexa_jax.core.progress_bar.SECONDS", 0.0)
    return Terminal()


def screen(text):
    """What a terminal shows of the last line, and the lines above."""
    *above, last = text.split("\n")
    return [line.rpartition(CLEAR)[2] for line in above], last.rpartition(CLEAR)[2]


def test_a_bar_says_how_far_and_fits_the_terminal():
    line = draw(1, 4, "epoch 1.00/4  loss 2.5", 80)
    assert line.startswith(" 25 % ") and line.endswith("loss 2.5")
    assert line.count("━") == WIDTH // 4 and line.count("─") == WIDTH - WIDTH // 4
    narrow = draw(4, 4, "x" * 100, 40)
    assert len(narrow) < 40 and narrow.startswith("100 %") and narrow.endswith("…")


def test_lines_go_above_the_bar(terminal, monkeypatch):
    monkeypatch.setattr("sys.stdout", terminal)
    bar = ProgressBar(terminal)
    bar.show(1, 2, "half")
    assert bar.active and screen(terminal.getvalue())[1].endswith("half")
    console.log("a line")
    bar.show(2, 2, "whole")
    above, last = screen(terminal.getvalue())
    assert above == ["a line"] and last.endswith("whole")
    bar.close()
    assert screen(terminal.getvalue()) == (["a line"], "")
    console.log("after")
    assert terminal.getvalue().endswith(f"{CLEAR}after\n") and not bar.active


def test_warnings_make_room(terminal):
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    try:
        bar = ProgressBar(terminal)
        bar.show(1, 2, "half")
        logging.warning("careful")
        assert screen(terminal.getvalue()) == (["careful"], "")
        bar.close()
        assert not handler.filters
    finally:
        logging.getLogger().removeHandler(handler)


def test_elsewhere_nothing_is_drawn_but_a_line_a_minute(monkeypatch, capsys):
    stream, times = io.StringIO(), iter(range(0, 1000, 30))
    bar = ProgressBar(stream)
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    assert list(bar.track("abcd", 4, "first pass")) == list("abcd")
    assert not bar.active and stream.getvalue() == ""
    assert capsys.readouterr().out.splitlines() == [
        "first pass: 1/4, 0:03:00 left",
        "first pass: 3/4, 0:00:40 left",
    ]


def test_a_dumb_terminal_has_no_bar(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    bar = ProgressBar(terminal)
    bar.show(1, 2, "half")
    assert not bar.active and terminal.getvalue() == ""
