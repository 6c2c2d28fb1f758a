"""Recipes by name: everywhere a path works, from any folder, with the nearest name where there is none."""

import os
import pathlib

import pytest
from command_line import REPOSITORY

from hexa_jax import main
from hexa_jax.cli import recipes as command
from hexa_jax.cli.command import parse_command
from hexa_jax.core.errors import ConfigError
from hexa_jax.core.recipes import recipe_file, recipe_names, summary


def parsed(*words):
    return parse_command(["hexa", *words, "--workdir=unused"]).config


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder without recipes of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_is_the_file_of_that_name(elsewhere):
    by_path = parsed(f"--config={REPOSITORY}/configs/deepcluster_v2.py:crops=6,epochs=7")
    assert parsed("--config=deepcluster_v2:crops=6,epochs=7").to_dict() == by_path.to_dict()
    assert parsed("--config", "deepcluster_v2:crops=6,epochs=7").to_dict() == by_path.to_dict()
    assert parsed("--config=eval/knn").task == "knn"


def test_paths_stay_paths(elsewhere):
    (elsewhere / "tiny").mkdir()  # a folder is no config file
    assert recipe_file("tiny").endswith("configs/tiny.py")
    (elsewhere / "mine.py").write_text(
        "from hexa_jax.configs import tiny\n\n\ndef get_config():\n"
        "    config = tiny.get_config('method=moco')\n    config.epochs = 77\n    return config\n"
    )
    config = parsed("--config=mine.py")
    assert (config.epochs, config.method) == (77, "moco")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("hexa_dclustr", "recipe 'hexa_dclustr' is not known; did you mean --config=hexa_dcluster?"),
        ("configs/tiny.py", "config file 'configs/tiny.py' does not exist; did you mean --config=tiny?"),
        ("hexa_dclustr.py", "config file 'hexa_dclustr.py' does not exist; did you mean --config=hexa_dcluster?"),
        ("knn", "recipe 'knn' is not known; did you mean --config=eval/knn?"),
        ("nothing-like-it", "recipe 'nothing-like-it' is not known; `hexa recipes` lists what there is"),
    ],
)
def test_a_wrong_name_is_one_line_with_the_nearest(given, line, elsewhere, capsys):
    assert main.main(["hexa", f"--config={given}", "--workdir=unused"]) == 2
    assert capsys.readouterr().err == f"hexa_jax: {line}\n"


def test_a_setting_given_as_a_flag_is_named(elsewhere):
    with pytest.raises(ConfigError, match=r"unknown flag --batch_size; did you mean --config\.batch_size\?"):
        parsed("--config=tiny", "--batch_size=32")
    with pytest.raises(ConfigError, match=r"--config\.optimizer\.learning_rate\?"):
        parsed("--config=tiny", "--learning_rate=1")


def test_every_recipe_has_a_name_and_a_line():
    files = {path.relative_to(REPOSITORY / "configs").with_suffix("").as_posix() for path in
             (REPOSITORY / "configs").rglob("*.py") if path.stem not in ("common", "__init__")}  # fmt: skip
    assert set(recipe_names()) == files
    assert all(summary(name).endswith(".") for name in recipe_names())


def test_recipes_are_listed(capsys):
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line} >= set(recipe_names())
    assert command.main(["simclr"]) == 0
    shown = capsys.readouterr().out.splitlines()[:-2]
    assert shown and all("simclr" in line.lower() for line in shown)
    assert command.main(["no such word"]) == 2


def test_the_recipes_of_a_clone_are_a_link():
    link = REPOSITORY / "hexa_jax" / "configs"
    assert link.is_symlink() and os.readlink(link) == "../configs"
    assert pathlib.Path(link).resolve() == REPOSITORY / "configs"
