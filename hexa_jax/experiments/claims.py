"""Confirmed comparisons as JSON: what `docs/claim.json` is made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from hexa_jax.experiments.paired import ALPHA, holm
from hexa_jax.experiments.study import METRIC, PRESETS, TRAINING, Study, cost, longer_epochs
from hexa_jax.experiments.study_page import CONTROLS, Declaration, Results, by_seed, rows


def claims(
    study: Study, declaration: Declaration, results: Results, command: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one object per arm and control of a confirmation whose cells are all there.

    Args:
        study: what was run.
        declaration: of the stage `confirm`.
        results: numbers of all its cells.
        command: words of the command that makes the comparison again.

    Returns:
        Objects with the names of experiment, data, arm and control; seeds; the mean difference of
        the metric in points with the bounds of its 95 % interval by Student's t; for EE, the
        comparison with plain training at equal epochs, also p by Holm's adjustment over the
        confirmed arms; passes_ratio, forward-sized passes of the arm per pass of its control;
        steps of the arm.
    """
    table = rows(declaration, results)
    family = holm([row.primary["EE"].p for row in table])
    claimed = []
    for row, adjusted in zip(table, family, strict=True):
        costs = _passes(study, row.name)
        steps = {int(results[f"{row.arm}-seed{seed}"]["step"]) for seed in declaration["seeds"]}
        for key, difference in row.primary.items():
            low, high = difference.interval(ALPHA)
            claim = {
                "experiment": f"{declaration['part']}/{declaration['preset']}",
                "data": list(declaration["data"]),
                "arm": row.name,
                "control": key,
                "control_run": declaration["arms"][row.name][CONTROLS[key]],
                "metric": METRIC,
                "seeds": sorted(by_seed(declaration, results, row.arm)),
                "difference": round(difference.mean, 3),
                "low": round(low, 3),
                "high": round(high, 3),
                "passes_ratio": round(costs["arm"] / costs[CONTROLS[key]], 3),
                "steps": max(steps),
                "command": " ".join(command),
                "commit": declaration["commit"],
            }
            if key == "EE":
                claim["p_holm"] = float(f"{adjusted.p:.2g}")
            claimed.append(claim)
    return claimed


def _passes(study: Study, name: str) -> Mapping[str, int]:
    """Forward-sized passes over one image in all epochs: of the arm and of its controls."""
    base, arm = next(
        (base, arm)
        for base in study.bases
        for arm in base.arms
        if f"{base.name}-{arm.name}" == name
    )
    epochs = PRESETS[study.preset].sizes[study.part].epochs
    return {
        "plain": cost(base, epochs),
        "extra": cost(base, epochs, TRAINING),
        "longer": cost(base, longer_epochs(base, arm, epochs)),
        "noise": cost(base, epochs, TRAINING, arm.start),
        "arm": cost(base, epochs, arm.passes, arm.start),
    }
