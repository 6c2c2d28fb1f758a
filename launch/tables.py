"""Rows of launch/aot.py for people: lines on a terminal, and Markdown tables."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

GIB = 2**30
TPU_HEAD = (
    "config",
    "chips",
    "program",
    "peak GiB",
    "TFLOP",
    "GB",
    "Mcycles",
    "ms: FLOP / memory / cycles",
    "between chips",
)
GPU_HEAD = (
    *(
        "config",
        "GPUs",
        "program",
        "peak GiB",
        "TFLOP",
        "GB",
        "of it convolutions",
        "kernels (under 1 MiB)",
    ),
    *("ms: FLOP / memory / floor", "between GPUs", "slow on GPUs"),
)


def lines_of(row: dict[str, Any]) -> list[str]:
    """Return what the terminal shows of a program."""
    lines = [f"{row['program']}: {row['advice'] or ('fits' if row['fits'] else 'does not fit')}"]
    if "by_kind" in row:
        lines += _gpu_lines(row)
    elif row["fits"]:
        lines += [
            f"  peak {row['peak_bytes'] / GIB:.2f} GiB a chip, of which arguments "
            f"{row['argument_bytes'] / GIB:.2f}",
            f"  {row['flops'] / 1e12:.3f} TFLOP, {row['bytes_accessed'] / 1e9:.2f} GB, "
            f"{row['estimated_cycles'] / 1e6:.2f} Mcycles",
            f"  at least {row['flops_ms']} ms of arithmetic, {row['memory_ms']} ms of memory; "
            f"estimated {row['cycles_ms']} ms",
        ]
    for kind, entry in row.get("collectives", {}).items():
        lines.append(f"  {entry['count']} x {kind}, {entry['bytes'] / 1e6:.3f} MB")
    return lines


def markdown(rows: Mapping[str, dict[str, Any]]) -> str:
    """Return a table of the rows of TPUs and one of those of GPUs, where there are any."""
    tpus = [_tpu_cells(row) for row in rows.values() if "by_kind" not in row]
    gpus = [_gpu_cells(row) for row in rows.values() if "by_kind" in row]
    tables = [_table(head, cells) for head, cells in ((TPU_HEAD, tpus), (GPU_HEAD, gpus)) if cells]
    return "\n".join(tables)


def kernel_table(row: dict[str, Any]) -> str:
    """Return the kinds of a GPU program's kernels, and its largest ones, as two Markdown tables."""
    kinds = [
        (
            kind,
            entry["count"],
            f"{entry['bytes'] / 1e9:.1f}",
            f"{entry['flops'] / 1e12:.2f}",
            f"{entry['floor_ms']:.1f}",
        )
        for kind, entry in row["by_kind"].items()
    ]
    largest = [
        (
            f"{one['bytes'] / 1e9:.2f}",
            _times(one),
            one["kind"],
            f"`{one['line']}`",
            one["path"],
            f"`{one['result']}`",
        )
        for one in row["largest"]
    ]
    return "\n".join(
        (
            _table(("kind", "kernels", "GB", "TFLOP", "floor ms"), kinds),
            _table(("GB", "times", "kind", "line", "path", "result"), largest),
        )
    )


def _gpu_lines(row: dict[str, Any]) -> list[str]:
    lines = [
        f"  peak {row['peak_bytes'] / GIB:.2f} GiB a GPU, of which arguments "
        f"{row['argument_bytes'] / GIB:.2f}",
        f"  {row['flops'] / 1e12:.3f} TFLOP, {row['bytes'] / 1e9:.2f} GB in {row['kernels']} "
        f"kernels, of which {row['small_kernels']} move less than 1 MiB",
        f"  at least {row['flops_ms']} ms of arithmetic, {row['memory_ms']} ms of memory, "
        f"{row['floor_ms']} ms with each kernel at the longer of both",
        f"  {'kind':<28} {'kernels':>7} {'GB':>8} {'TFLOP':>8} {'floor ms':>9}",
    ]
    for kind, entry in row["by_kind"].items():
        lines.append(
            f"  {kind:<28} {entry['count']:>7} {entry['bytes'] / 1e9:>8.2f} "
            f"{entry['flops'] / 1e12:>8.3f} {entry['floor_ms']:>9.2f}"
        )
    lines.append("  largest:     GB  times  kind, line, path, result")
    for one in row["largest"]:
        where = ", ".join(
            part for part in (one["kind"], one["line"], one["path"], one["result"]) if part
        )
        lines.append(f"  {one['bytes'] / 1e9:>15.2f} {_times(one):>6}  {where}"[:200])
    return lines + [f"  slow: {warning}" for warning in row["warnings"]]


def _times(one: dict[str, Any]) -> str:
    return str(one["times"])


def _tpu_cells(row: dict[str, Any]) -> list[str]:
    cells = [_settings(row), row["topology"], row["program"]]
    if not row["fits"]:
        return [*cells, f"{row['peak_bytes'] / GIB:.1f}: {row['advice']}", "", "", "", "", ""]
    return [
        *cells,
        f"{row['peak_bytes'] / GIB:.1f}",
        f"{row['flops'] / 1e12:.2f}",
        f"{row['bytes_accessed'] / 1e9:.1f}",
        f"{row['estimated_cycles'] / 1e6:.1f}",
        f"{row['flops_ms']:.1f} / {row['memory_ms']:.1f} / {row['cycles_ms']:.1f}",
        _travel(row),
    ]


def _gpu_cells(row: dict[str, Any]) -> list[str]:
    peak = f"{row['peak_bytes'] / GIB:.1f}"
    convolutions = sum(
        entry["bytes"] for kind, entry in row["by_kind"].items() if kind.startswith("convolution")
    )
    return [
        _settings(row),
        row["topology"],
        row["program"],
        peak if row["fits"] or not row["advice"] else f"{peak}: {row['advice']}",
        f"{row['flops'] / 1e12:.2f}",
        f"{row['bytes'] / 1e9:.1f}",
        f"{convolutions / 1e9:.1f}",
        f"{row['kernels']} ({row['small_kernels']})",
        f"{row['flops_ms']:.1f} / {row['memory_ms']:.1f} / {row['floor_ms']:.1f}",
        _travel(row),
        "; ".join(re.sub(r": .*", "", warning) for warning in row["warnings"]) or "nothing",
    ]


def _settings(row: dict[str, Any]) -> str:
    return f"{row['config']} {' '.join(row['overrides'])}".strip()


def _travel(row: dict[str, Any]) -> str:
    entries = row["collectives"].items()
    return (
        ", ".join(
            f"{entry['count']} {kind} ({entry['bytes'] / 1e6:.1f} MB)" for kind, entry in entries
        )
        or "nothing"
    )


def _table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
