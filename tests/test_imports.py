"""Who may import whom, read from the source: imports point downward, and heavy packages stay in their corner."""

import ast
import itertools
import pathlib

import pytest

import hexa_jax

ROOT = pathlib.Path(hexa_jax.__file__).parent
# Higher may import lower. The longest prefix counts; modules of one package and level may import each other.
LEVELS = {
    "arguments": 0,
    "losses": 0,
    "kmeans": 0,
    "models": 0,
    "data": 0,  # sources, decoding, augmentation
    "remote": -1,
    "mirror": 1,
    "hosts": -1,
    "workdir": 1,
    "progress": 0,
    "stops": 0,
    "checkpoint": 2,
    "leaves": 1,
    "manifest": 0,
    "lost_references": 0,
    "draws": 0,
    "mesh": 1,
    "optim": 1,
    "views": 1,
    "methods": 1,
    "weights": 1,
    "training.microbatch": 1,
    "data.crops": 2,
    "training": 4,
    "training.objective": 2,
    "data.pipeline": 3,
    "training.objective_from_outputs": 3,
    "build": 5,
    "command": 6,
    "export": 7,
    "report": 6,
    "inputs": 6,
    "memory": 6,
    "evals": 6,
    "grid": 5,
    "data.voc": 1,
    "runs": 6,
    "pretrain": 7,
    "main": 8,
    "prepare": 1,
    "experiments": 8,
}
PURE = ("methods", "losses", "kmeans", "models", "views", "training")
NOT_PURE = {"tensorflow", "tensorflow_datasets", "orbax", "ml_collections", "absl", "clu", "grain", "configs"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.name != "__init__.py"
}


def imported(path, module_level=False) -> set[str]:
    """Full names of what a file imports: `from a import b` counts as a and a.b."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if module_level and id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative imports hide their direction"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(path) -> set[str]:
    """Modules of this package that a file imports, without the package's name."""
    names = {name.removeprefix("hexa_jax.") for name in imported(path) if name.startswith("hexa_jax.")}
    return names & MODULES.keys()


def belongs(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def prefix_of(name: str) -> str:
    matches = [prefix for prefix in LEVELS if belongs(name, prefix)]
    assert matches, f"hexa_jax.{name} has no place in LEVELS: say what it may import"
    return max(matches, key=len)


def test_the_parser_sees_imports():
    assert own(MODULES["models.heads"]) == {"models.norm", "models.resnet"}
    assert {"training.step", "methods.base"} <= own(MODULES["inputs"]) and len(MODULES) > 25
    assert "report" in own(MODULES["pretrain"])  # from hexa_jax import report
    lazy = imported(MODULES["data.tfds_source"]) - imported(MODULES["data.tfds_source"], module_level=True)
    assert lazy == {"tensorflow_datasets"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name):
    prefix = prefix_of(name)
    for other in own(MODULES[name]):
        below = prefix_of(other)
        assert below == prefix or LEVELS[below] < LEVELS[prefix], f"hexa_jax.{name} imports hexa_jax.{other}"


def test_levels_keep_the_design():
    """main -> pretrain | evals -> training -> {methods, views, optim} -> {losses, kmeans, models}."""
    order = [
        ["main"],
        ["pretrain", "evals"],
        ["training"],
        ["methods", "views", "optim"],
        ["losses", "kmeans", "models"],
    ]
    for upper, lower in itertools.pairwise(order):
        assert min(LEVELS[name] for name in upper) > max(LEVELS[name] for name in lower)


@pytest.mark.parametrize("name", [name for name in MODULES if any(belongs(name, prefix) for prefix in PURE)])
def test_mathematics_imports_no_infrastructure(name):
    assert not {full.split(".")[0] for full in imported(MODULES[name])} & NOT_PURE


def test_methods_and_views_do_not_know_each_other():
    for name, path in MODULES.items():
        if belongs(name, "methods"):
            assert not {other for other in own(path) if belongs(other, "views") or belongs(other, "training")}
        if belongs(name, "views"):
            assert all(belongs(other, "views") or other == "models.norm" for other in own(path))


def test_orbax_stays_behind_checkpoint():
    users = {name for name, path in MODULES.items() if any(belongs(full, "orbax") for full in imported(path))}
    assert users == {"checkpoint"}


def test_no_module_touches_the_process_wide_drawing_back_end():
    """Figures are objects: pyplot's state, and the notebook's way to show figures, are the user's."""
    for name, path in MODULES.items():
        assert "matplotlib.pyplot" not in imported(path), name
        assert "matplotlib.use(" not in path.read_text(), name


def test_tensorflow_is_imported_by_nobody_at_module_level():
    """Nor what imports it or takes long: clu's writers and tfds come only when asked for."""
    for name, path in MODULES.items():
        full_names = imported(path, module_level=True) - {
            "clu",
            "clu.parameter_overview",
        }  # this one needs no TensorFlow
        heavy = {full.split(".")[0] for full in full_names} & {"tensorflow", "clu", "tensorflow_datasets"}
        assert not heavy, f"hexa_jax.{name} imports {heavy}"
        assert not any(belongs(full, "tensorflow") for full in imported(path)), name
