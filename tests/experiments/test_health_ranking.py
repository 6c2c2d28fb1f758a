"""How measures without labels rank runs: the correlation, what is left out, mistakes."""

import json

import numpy as np
import pytest

from configs import tiny
from hexa_jax.experiments import health_ranking
from hexa_jax.experiments.health_ranking import main, rank


def spearman(a, b):
    """Of ranks without ties, by the formula of squared differences."""
    places = [np.argsort(np.argsort(x)) for x in (a, b)]
    n = len(a)
    return 1 - 6 * np.sum((places[0] - places[1]) ** 2) / (n * (n * n - 1))


def test_correlations_are_spearmans_with_better_first():
    rng = np.random.default_rng(0)
    rankme, alignment, accuracy = rng.normal(size=(3, 9))
    measures = [{"rankme": r, "alignment": a} for r, a in zip(rankme, alignment, strict=True)]
    found = {ranking.name: ranking for ranking in rank(measures, accuracy)}
    assert found["rankme"].correlation == pytest.approx(spearman(rankme, accuracy))
    assert found["alignment"].correlation == pytest.approx(-spearman(alignment, accuracy))
    assert found.keys() == {"rankme", "alignment"} and found["rankme"].runs == 9


def test_equal_values_and_few_runs():
    same = rank([{"rankme": 1.0}] * 5, [1, 2, 3, 4, 5])
    assert np.isnan(same[0].correlation)
    assert "equal values" in health_ranking.table(same, "knn_accuracy")
    assert rank([{"rankme": float(n)} for n in range(3)], [1, 2, 3]) == []


@pytest.fixture
def runs(tmp_path):
    """Six runs: rank and accuracy rise together; the last logged no health, the one before has no result."""
    folders = []
    for number in range(6):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(tiny.get_config().to_dict()))
        line = {"step": 8, "rankme": 10.0 * number, "uniformity": 1.0 - number}
        (folder / "metrics.jsonl").write_text(json.dumps(line if number < 5 else {"step": 8}) + "\n")
        if number != 4:
            (folder / "result.json").write_text(json.dumps({"knn_accuracy": 30.0 + number}))
        folders.append(str(folder))
    return folders


def test_the_command_ranks_runs_and_names_those_it_leaves_out(runs, tmp_path, capsys):
    assert main([*runs, f"--output={tmp_path / 'table.md'}"]) == 0
    output = capsys.readouterr().out
    assert "run4 is left out: its result has no knn_accuracy" in output
    assert "run5 is left out: it logged no health; --measure" in output
    text = (tmp_path / "table.md").read_text()
    assert "| rankme | +1.00 |" in text and "| uniformity | +1.00 |" in text and "| 4 |" in text


def test_what_was_measured_is_kept(runs, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        health_ranking, "measure_run", lambda w, images: calls.append((w.name, images)) or {"rankme": 99.0}
    )
    words = [*runs, "--measure", "--images=64", f"--output={tmp_path / 'table.md'}"]
    assert main(words) == 0 and main(words) == 0
    assert calls == [("run5", 64)]
    assert "| rankme | +1.00 |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "required: workdirs"),
        (["RUN"], "1 runs with health and knn_accuracy: at least 4"),
        (["RUN", "--measure"], "give --output=FILE.md"),
        (["nowhere"], "not the workdir of a pre-training run"),
    ],
)
def test_mistakes_are_one_line(words, said, runs, capsys):
    assert main([runs[0] if word == "RUN" else word for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hexa_jax.experiments.health_ranking: ") and said in line
