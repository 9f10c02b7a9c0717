"""The command `cir-jax report`."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from cir_jax.arguments import one_line_errors, positive
from cir_jax.config import ConfigError


def add(commands) -> None:
    report = commands.add_parser(
        "report",
        help="make one HTML file of runs: curves, tables, trajectories",
        description="Writes one HTML file about runs, evaluations and ablations, which needs "
        "nothing else to be read: no server, no network. Several runs are laid over each other, "
        "and their trajectories on the same problem side by side.",
    )
    report.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="directory of a run, of an evaluation, or of `cir-jax ablate` (all of its runs)",
    )
    report.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), help="(default: %(default)s)"
    )
    report.add_argument(
        "--trajectories",
        type=positive,
        default=2000,
        metavar="N",
        help="at most so many, evenly spread over what the directories hold (default: %(default)s)",
    )
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "report: matplotlib, which draws the figures, is missing: "
            "pip install 'cir_jax[figures]'"
        )
    if args.out.is_dir():
        raise ConfigError(f"--out {str(args.out)!r}: is a directory; must be a file")
    from cir_jax.report import page, source

    with one_line_errors("report"):
        material = source.gather(args.runs)
        html, notes = page.render(material, most=args.trajectories)
        # Another report of that name stays until this one is whole.
        aside = args.out.with_name(args.out.name + ".new")
        aside.write_bytes(html.encode("utf-8", "replace"))
        os.replace(aside, args.out)
    for note in notes:
        print(f"cir-jax report: {note}", file=sys.stderr)
    print(args.out)
    return 0
