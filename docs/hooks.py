"""Pages of the documentation that are made from the code: config keys, recipes and data sources (called by mkdocs)."""

import ast
import io
import pathlib
import re
import tokenize
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parent.parent
SKIPPED = {"__init__.py", "common.py"}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to those of the folder."""
    pages = {
        "reference/config.md": config_keys(),
        "reference/recipes.md": recipes(),
        "reference/sources.md": sources(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def config_keys() -> str:
    """The page of all keys: name, default, and the comment beside or above it in configs/common.py."""
    source = (ROOT / "configs" / "common.py").read_text()
    comments = _comments(source)
    function = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "get_config"
    )
    names, rows = {"config": ""}, []
    for node in function.body:
        rows += _rows(node, names, comments, source)
    groups: dict[str, list[str]] = {}
    for key, default, text in rows:
        group = key.rpartition(".")[0] or "general"
        line = f"| `{key}` | `{default}` | {text} |".replace("\n", " ")
        groups.setdefault(group, []).append(line)
    parts = [
        "# Config keys\n\nMade from `configs/common.py`. Give any of them as `--config.key=value`; "
        "keys"
        " below `runtime` say how to run and may change when a run is resumed, all others may "
        "not.\n"
    ]
    for group, lines in groups.items():
        parts.append(
            f"## {group}\n\n| key | default | meaning |\n|---|---|---|\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(parts)


def _rows(
    node: ast.stmt, names: dict[str, str], comments: dict[int, str], source: str
) -> list[tuple[str, str, str]]:
    """Keys that a statement of get_config sets; `names` maps its variables to groups of keys."""
    if not isinstance(node, ast.Assign):
        return []
    keys = [ast.unparse(target) for target in node.targets]
    value = ast.unparse(node.value)
    full = [_full(key, names) for key in keys]
    if "ConfigDict(" in value and "hard_view" not in value:
        group = next((key for key in full if key), "")
        for key in keys if group else ():
            names[key] = group
        return []
    name = next((key for key in full if key), "")
    if not name:
        return []
    text = " ".join(filter(None, (_above(node.lineno, comments, source), _beside(node, comments))))
    if value.startswith("hard_view("):
        value = f"weight=0.0, ...{', ' if value != 'hard_view()' else ''}{value[len('hard_view(') : -1]}"
    return [(name, value, _plain(text))]


def _full(key: str, names: dict[str, str]) -> str:
    head, _, rest = key.partition(".")
    if head not in names or not rest:
        return ""
    return f"{names[head]}.{rest}".lstrip(".")


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def _beside(node: ast.stmt, comments: dict[int, str]) -> str:
    lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    return " ".join(comments[line] for line in lines if line in comments)


def _above(line: int, comments: dict[int, str], source: str) -> str:
    """The comment lines that stand directly above a line."""
    lines, found = source.splitlines(), []
    line -= 1
    while line and lines[line - 1].lstrip().startswith("#"):
        found.append(comments[line])
        line -= 1
    return " ".join(reversed(found))


def _plain(text: str) -> str:
    """Text in which Markdown finds neither a table's columns nor links."""
    return re.sub(r"([|\[\]*_<])", r"\\\1", text)


def recipes() -> str:
    """The page of all recipes: the first paragraph of each config file."""
    parts = ["# Recipes\n\nMade from `configs/`. Use one as `--config=configs/NAME.py`.\n"]
    for title, folder in (("Pre-training", "configs"), ("Evaluations", "configs/eval")):
        parts.append(f"## {title}\n\n| recipe | what it is |\n|---|---|")
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.name in SKIPPED:
                continue
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            first = re.sub(r"\s+", " ", text.partition("\n\n")[0])
            parts.append(f"| `{path.stem}` | {_plain(first)} |")
        parts.append("")
    return "\n".join(parts)


def sources() -> str:
    """The page of all kinds of sources, as they are registered."""
    from hexa_jax.data.sources import SOURCES  # of the checkout that mkdocs is started in

    parts = [
        "# Data sources\n\nWhat `--config.data.source` and `--config.data.eval_source` take: one "
        "of these, or the path of a"
        " folder or file whose kind is clear. GLOB is a file, a folder, or a pattern with `*`, `?` "
        "and `**`.\n\n"
        "| source | what it reads |\n|---|---|"
    ]
    parts += [f"| `{kind.usage}` | {kind.summary} |" for kind in SOURCES.values()]
    return "\n".join(parts) + "\n"
