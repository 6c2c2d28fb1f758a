"""Command line: `python -m hexa_jax.experiments NAME --workdir=DIR [--preset=P] ...`.

NAME         fig1   gallery of hard examples
             fig2   schemes of hard examples
             fig3   accuracy over epochs
             fig4   strength of the attack
             fig5   Beta distributions of CutMix
             claim  plain methods beside HEXA at equal epochs, with differences by seed
             study  whether hard examples help, with controls; see study --help
--workdir    of the experiment; starting again skips finished cells, resumes stopped ones and
             tries failed ones anew
--preset     imagenet (the paper's protocol), imagenette, cifar10 or tiny (two CPU cores, the
             default)
--methods    comma-separated: moco, deepcluster, simclr, swav, rotation, byol, simsiam, pcl,
             supervised, as far as the preset has them; by default the figure's own
--seeds      comma-separated numbers, by default 0
--config.key=value   an override for every pre-training run; runtime.* for every probe, too

Exit codes: 0 everything is there, 1 a cell failed (the rest was done), 2 a mistake in the command,
143 stopped by SIGTERM.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from hexa_jax.core.arguments import Parser
from hexa_jax.core.console import log
from hexa_jax.experiments import study_command
from hexa_jax.experiments.figures import FIGURES
from hexa_jax.experiments.gallery import draw_gallery
from hexa_jax.experiments.presets import CONTROL, GRIDS, METHODS, PLAIN, PRESETS
from hexa_jax.experiments.sweep import GridError, Outcome, gather, run_grid
from hexa_jax.experiments.tables import factors_of, markdown, write_csv
from hexa_jax.storage.gcs import is_remote


def main(argv: list[str]) -> int:
    """Run an experiment; returns the exit code."""
    if argv[:1] == ["study"]:
        return study_command.main(argv[1:])
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    parser = Parser("hexa_jax.experiments", GridError)
    parser.add_argument("name", choices=sorted(GRIDS))
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--methods")
    parser.add_argument("--seeds", default="0")
    try:
        known, extra = parser.parse_known_args(argv)
        wrong = [word for word in extra if not word.startswith("--config.")]
        if wrong:
            raise GridError(
                f"unknown argument {wrong[0]!r}; see python -m hexa_jax.experiments --help"
            )
        methods = known.methods.split(",") if known.methods else METHODS[known.name]
        unknown = [method for method in methods if method not in PRESETS[known.preset].configs]
        if unknown:
            raise GridError(
                f"unknown method {unknown[0]!r}: use some of "
                f"{', '.join(PRESETS[known.preset].configs)}"
            )
        if not known.seeds.replace(",", "").isdigit():
            raise GridError(f"--seeds takes whole numbers such as 0,1,2, not {known.seeds!r}")
        seeds = [int(seed) for seed in known.seeds.split(",") if seed]
        if is_remote(known.workdir):
            raise GridError(f"--workdir={known.workdir}: an experiment needs a local folder")
        workdir = pathlib.Path(known.workdir).expanduser().absolute()
        # Cells that differ in their seed alone are one program: compiled once for all of them.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir / "compiled"))
        entries, so_far = GRIDS[known.name](known.preset, methods, seeds), f"{known.name}.csv"
        outcomes = run_grid(
            entries,
            workdir,
            extra,
            ended=lambda *_: write_csv(gather(entries, workdir), workdir / so_far),
        )
    except GridError as error:
        print(f"hexa_jax.experiments: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"hexa_jax.experiments: {error.filename or 'output'}: {error.strerror or error}",
            file=sys.stderr,
        )
        return 2
    return _report(known.name, outcomes, workdir)


def _report(name: str, outcomes: Sequence[Outcome], workdir: pathlib.Path) -> int:
    write_csv(outcomes, workdir / f"{name}.csv")
    baselines = {}
    for outcome in outcomes:
        factors = factors_of(outcome)
        baselines[factors] = (
            factors[0],
            *{"fig4": ("-", "-"), "fig5": ("plain",), "claim": (CONTROL,)}.get(name, (PLAIN,)),
        )
    text = markdown(outcomes, None if name == "fig1" else baselines)
    (workdir / f"{name}.md").write_text(text)
    if name == "fig1":
        paths = [
            path
            for outcome in outcomes
            if not outcome.failure
            for path in draw_gallery(outcome.folder, workdir)
        ]
    else:
        paths = FIGURES[name](outcomes, workdir)
    log(text)
    for path in paths:
        log(str(path))
    return 1 if any(outcome.failure for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
