"""The command `cir-jax ablate`."""

import argparse
import importlib.util
from pathlib import Path

from cir_jax import config as configs
from cir_jax.ablation.strategies import STRATEGIES, without
from cir_jax.arguments import add_overrides, count
from cir_jax.config import ConfigError
from cir_jax.data import sources


def add(commands) -> None:
    ablate = commands.add_parser(
        "ablate",
        help="train with each of the six strategies switched off in turn",
        usage="cir-jax ablate CONFIG [key.path=value ...] [--out DIR] [--seeds N ...] "
        "[--off STRATEGY ...]",
        description="Trains as CONFIG says, and once more with each of CIR's six strategies "
        "switched off, for each seed, and prints a table. A run is OUT/STRATEGY/SEED; one that is "
        "there already is not done again, one that was stopped goes on. OUT also gets the table "
        "(ablation.md), its figures (ablation.json) and a plot (ablation.png), renewed after "
        "every run.",
    )
    ablate.add_argument("config", metavar="CONFIG", help="TOML file of the run with all strategies")
    ablate.add_argument(
        "--out", type=Path, help="directory (default: runs/NAME_ablation, NAME the config's)"
    )
    ablate.add_argument(
        "--seeds", type=count, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)"
    )
    ablate.add_argument(
        "--off",
        nargs="+",
        choices=tuple(STRATEGIES),
        default=list(STRATEGIES),
        metavar="STRATEGY",
        help=f"which runs, of {', '.join(STRATEGIES)} (default: all)",
    )
    add_overrides(ablate)
    ablate.set_defaults(run=_ablate)


def _ablate(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "ablate: matplotlib, which draws the figure, is missing: pip install 'cir_jax[figures]'"
        )
    cfg = configs.load(args.config, args.overrides)
    sources.check(cfg.data)
    out = args.out or Path("runs") / f"{cfg.name}_ablation"
    # All are checked before the first is run.
    runs = {
        (name, seed): without(cfg, name, seed, out / name / str(seed))
        for seed in args.seeds
        for name in args.off
    }
    from cir_jax.ablation.runs import run_all

    print(run_all(runs, out), end="")
    print(out)
    return 0
