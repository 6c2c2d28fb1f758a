"""Files and settings of others are data, never programs: nothing in the source would run them, and what tries is refused."""

import ast
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
from command_line import REPOSITORY

from hexa_jax.models.weights import WeightsError, read_weights

FOLDERS = ("hexa_jax", "launch", "benchmarks", "configs", "notebooks")
PROGRAMS = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))
NEVER = {
    "eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "joblib.load", "yaml.load",
    "cloudpickle.load", "cloudpickle.loads", "pd.read_pickle", "pandas.read_pickle",
    "shutil.unpack_archive",
}  # fmt: skip
ONLY_WITH = {
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
    "tarfile.open": ("mode", "r:"),  # where members lie in an uncompressed file; none is extracted
}


def wrong_calls(source: str) -> list[str]:
    """What a program calls that runs, or may run, what a file or a setting says."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, constants = ast.unparse(node.func), {}
        for keyword in node.keywords:
            constants[keyword.arg] = keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
        argument, value = ONLY_WITH.get(name, (None, None))
        if name in NEVER or name.endswith((".extractall", ".extract")):
            wrong.append(name)
        elif argument and constants.get(argument) != value:
            wrong.append(f"{name} without {argument}={value}")
        elif constants.get("shell", False) is not False:
            wrong.append(f"{name} with a shell")
    return wrong


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_runs_what_a_file_says(path):
    assert wrong_calls(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)", "os.system(f'rm {x}')", "subprocess.run(x, shell=True)", "subprocess.run(x, shell=y)", "pickle.load(f)",
        "np.load(f)", "np.load(f, allow_pickle=True)", "torch.load(f)", "torch.load(f, weights_only=False)",
        "zipfile.ZipFile(f).extractall(d)", "tarfile.open(f)", "tarfile.open(f, mode='r')",
    ],
)  # fmt: skip
def test_the_search_finds(source):
    assert wrong_calls(source)


class Bomb:
    """Pickled, an order to make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def npy(path):
    """An array of one object, as NumPy writes it: its elements are a pickle."""
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb(path)], object), allow_pickle=True)
    return stream.getvalue()


def test_weights_that_are_programs_are_refused(tmp_path):
    bomb = tmp_path / "bomb"
    with zipfile.ZipFile(tmp_path / "weights.npz", "w") as archive:
        archive.writestr("w.npy", npy(bomb))
    with pytest.raises(WeightsError, match=r"weights\.npz cannot be read"):
        read_weights(str(tmp_path / "weights.npz"))
    pytest.importorskip("torch", reason="reading .pth needs torch")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"state_dict": Bomb(bomb)}))
    with zipfile.ZipFile(tmp_path / "new.pth", "w") as archive:  # as torch writes them since 1.6
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": Bomb(bomb)}))
        archive.writestr("archive/version", "3\n")
    for name in ("old.pth", "new.pth"):
        with pytest.raises(WeightsError, match=f"{name} cannot be read as weights alone"):
            read_weights(str(tmp_path / name))
    assert not bomb.exists()
