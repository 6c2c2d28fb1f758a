"""Who may import whom, read from the source: imports point downward, and heavy packages stay in their corner."""

import ast
import itertools
import pathlib

import pytest

import hexa_jax

ROOT = pathlib.Path(hexa_jax.__file__).parent
# A package may import packages of lower levels, and itself. The longest prefix counts.
LEVELS = {
    "losses": 0,
    "kmeans": 0,
    "models": 0,
    "parallel": 1,
    "core": 2,
    "optim": 2,
    "storage": 3,
    "views": 3,
    "methods": 3,
    "checkpoint": 4,
    "data": 4,
    "prepare": 5,
    "evals": 5,  # the mathematics of evaluations
    "report": 5,
    "explore": 6,
    "training": 6,
    "evals.tasks": 7,  # the evaluations that a config can name
    "export": 8,
    "detection": 8,
    "experiments": 8,
    "cli.command": 9,
    "main": 10,
    "cli": 11,
    "__main__": 12,
}
PURE = (
    "methods",
    "losses",
    "kmeans",
    "models",
    "views",
    "training.step",
    "training.objective",
    "training.objective_from_outputs",
    "training.microbatch",
)
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
    assert {"training.step", "core.batch"} <= own(MODULES["training.input"]) and len(MODULES) > 25
    assert "report.page" in own(MODULES["training.loop"])  # from hexa_jax.report import page
    lazy = imported(MODULES["data.sources.tfds"]) - imported(MODULES["data.sources.tfds"], module_level=True)
    assert lazy == {"tensorflow_datasets"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name):
    prefix = prefix_of(name)
    for other in own(MODULES[name]):
        below = prefix_of(other)
        assert below == prefix or LEVELS[below] < LEVELS[prefix], f"hexa_jax.{name} imports hexa_jax.{other}"


def test_levels_keep_the_design():
    """main -> evaluations -> training -> {methods, views, optim} -> {losses, kmeans, models}."""
    order = [
        ["main"],
        ["evals.tasks", "detection"],
        ["training"],
        ["methods", "views", "optim"],
        ["losses", "kmeans", "models"],
    ]
    for upper, lower in itertools.pairwise(order):
        assert min(LEVELS[name] for name in upper) > max(LEVELS[name] for name in lower)


def test_few_modules_lie_at_the_top():
    assert sum("." not in name for name in MODULES) <= 10


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
    assert users == {"checkpoint.checkpointer"}


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
