"""The notebooks: written from their sources, without outputs, and they run at miniature size."""

import os

import jupytext
import nbformat
import pytest
from command_line import REPOSITORY, environment
from nbclient import NotebookClient

NAMES = ("pretrain", "use_a_backbone")


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_that_of_its_source(name):
    source = jupytext.read(REPOSITORY / "notebooks" / f"{name}.py")
    written = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)
    assert [(cell.cell_type, cell.source) for cell in written.cells] == [(c.cell_type, c.source) for c in source.cells]
    assert all(not cell.get("outputs") for cell in written.cells), "make notebooks writes them without outputs"


def execute(name, folder, **settings):
    """Run a notebook's source in a kernel of its own, in the repository's root; returns the text that it printed.

    Each cell that ends in `plt.show()` must have shown a picture.
    """
    env = environment() | settings | {"IPYTHONDIR": str(folder), "JUPYTER_RUNTIME_DIR": str(folder)}
    env.pop("MPLBACKEND", None)  # the kernel chooses its own, as it does in Jupyter
    notebook = jupytext.read(REPOSITORY / "notebooks" / f"{name}.py")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    before = dict(os.environ)
    os.environ.update(env)
    try:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(REPOSITORY)}}).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in (cell for cell in cells if "plt.show()" in cell.source):
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The workdir and printed text of the first notebook."""
    folder = tmp_path_factory.mktemp("notebook")
    return folder / "run", execute("pretrain", folder, HEXA_MINIATURE="1", HEXA_WORKDIR=str(folder / "run"))


def test_pretrain_runs(pretrained):
    workdir, text = pretrained
    assert "the attack moves" in text and (workdir / "result.json").exists()


def test_use_a_backbone_runs(pretrained, tmp_path):
    text = execute("use_a_backbone", tmp_path, HEXA_CHECKPOINT=str(pretrained[0]), HEXA_SIDE="16")
    assert "linear probe: " in text
