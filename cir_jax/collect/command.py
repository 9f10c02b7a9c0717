"""The command `cir-jax collect`."""

import argparse
from pathlib import Path

from cir_jax import config as configs
from cir_jax.arguments import one_line_errors, positive
from cir_jax.config import Config, ConfigError
from cir_jax.data import tasks

# R1-CI's trajectories per task for SFT.
_PER_TASK = 70


def add(commands) -> None:
    collect = commands.add_parser(
        "collect",
        help="keep a model's correct trajectories, for SFT",
        usage="cir-jax collect MODEL|RUN [key.path=value ...] --problems N --out FILE [options]",
        description="Lets a model answer problems as in training (rollout.samples_per_prompt "
        "answers to each, programs run) and keeps correct, whole, distinct answers in FILE, one "
        "object a line, which sft.data of a config takes. Counts of correct answers to each "
        "problem go into FILE's name with .answers.jsonl. The "
        "same command goes on where it was stopped, with the same result.",
    )
    collect.add_argument(
        "model",
        metavar="MODEL|RUN",
        help="run directory (its newest checkpoint and its config), or directory (or package:NAME) "
        "of weights, with --config",
    )
    # Beside the first one: argparse does not find them behind an option.
    collect.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="override of a config key"
    )
    collect.add_argument("--out", metavar="FILE", type=Path, required=True, help="ends in .jsonl")
    collect.add_argument("--config", metavar="CONFIG", help="TOML file, in place of the run's")
    collect.add_argument(
        "--split",
        choices=("sft", "rl"),
        default="sft",
        help="whose problems: rl is what RL draws from (default: %(default)s)",
    )
    collect.add_argument(
        "--problems", metavar="N", type=positive, required=True, help="tasks in turn"
    )
    collect.add_argument(
        "--per-problem", metavar="N", type=positive, default=1, help="at most (default: 1)"
    )
    collect.add_argument(
        "--per-task",
        metavar="N",
        type=positive,
        default=_PER_TASK,
        help="at most (default: %(default)s)",
    )
    collect.set_defaults(run=_collect)


def _collect(args: argparse.Namespace) -> int:
    cfg = _config(args)
    tasks.check_names(cfg.data.tasks)
    if args.out.suffix != ".jsonl":
        raise ConfigError(f"--out {str(args.out)!r}: must end in .jsonl")
    from cir_jax.collect.rejection import Request, collect
    from cir_jax.train.display import Display

    request = Request(
        args.model, args.out, args.split, args.problems, args.per_problem, args.per_task
    )
    with one_line_errors("collect"):
        args.out.parent.mkdir(parents=True, exist_ok=True)
    collect(cfg, request, Display())
    print(args.out)
    return 0


def _config(args: argparse.Namespace) -> Config:
    if args.config:
        return configs.load(args.config, args.overrides)
    path = configs.asset_dir(args.model)
    if configs.holds_weights(path):
        raise ConfigError(
            f"MODEL|RUN={args.model!r}: holds weights alone; --config CONFIG says what is asked"
        )
    return configs.override(configs.load_run(path), args.overrides)
