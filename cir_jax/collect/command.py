"""The commands `cir-jax collect` and `cir-jax curriculum`."""

import argparse
from pathlib import Path

from cir_jax import config as configs
from cir_jax.arguments import add_overrides, one_line_errors, positive
from cir_jax.config import Config, ConfigError
from cir_jax.data import curriculum, sources

# R1-CI's: trajectories per task for SFT, steps per stage.
_PER_TASK = 70
_STAGE_STEPS = 150


def add(commands) -> None:
    collect = commands.add_parser(
        "collect",
        help="keep a model's correct trajectories, for SFT",
        usage="cir-jax collect MODEL|RUN [key.path=value ...] --problems N --out FILE [options]",
        description="Lets a model answer problems as in training (rollout.samples_per_prompt "
        "answers to each, at most as many programs as rollout.max_calls comes to) and keeps "
        "correct, whole, distinct answers in FILE, one object a line, which sft.data of a config "
        "takes. Counts of correct answers to each problem, which `cir-jax curriculum` takes, go "
        "into FILE's name with .answers.jsonl. The same command goes on where it was stopped, with "
        "the same result.",
    )
    collect.add_argument(
        "model",
        metavar="MODEL|RUN",
        help="run directory (its newest checkpoint and its config), or directory (or package:NAME) "
        "of weights, with --config",
    )
    # Beside the first one: argparse does not find them behind an option.
    add_overrides(collect)
    collect.add_argument("--out", metavar="FILE", type=Path, required=True, help="ends in .jsonl")
    collect.add_argument("--config", metavar="CONFIG", help="TOML file, in place of the run's")
    collect.add_argument(
        "--split",
        choices=("sft", "rl"),
        default="sft",
        help="whose problems of data.tasks: rl is what RL draws from (default: %(default)s)",
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

    planner = commands.add_parser(
        "curriculum",
        help="order problems by how much they can still teach",
        description="Sorts problems, or tasks, by 4p(1-p) of the share p of correct answers into "
        "four groups, and writes which of them data.curriculum of a config lets RL draw from which "
        "step on: first those of 0.64 and more, then also those of 0.48, 0.32, 0 and more.",
    )
    planner.add_argument(
        "answers",
        nargs="+",
        metavar="ANSWERS",
        type=Path,
        help="counts by `cir-jax collect` (.answers.jsonl); those of equal problems are added",
    )
    planner.add_argument("--out", metavar="FILE", type=Path, required=True, help="is overwritten")
    planner.add_argument(
        "--by",
        choices=("problem", "task"),
        default="problem",
        help="what p is of, and what is drawn (default: %(default)s)",
    )
    planner.add_argument(
        "--stage-steps",
        metavar="N",
        type=positive,
        default=_STAGE_STEPS,
        help="RL steps before the next group joins (default: %(default)s)",
    )
    planner.set_defaults(run=_plan)


def _collect(args: argparse.Namespace) -> int:
    cfg = _config(args)
    sources.check(cfg.data)
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


def _plan(args: argparse.Namespace) -> int:
    plan = curriculum.make(
        curriculum.read_answers(args.answers, args.by), args.by, args.stage_steps
    )
    with one_line_errors("curriculum"):
        curriculum.write(plan, args.out)
    for stage in plan.stages:
        total = len(plan.at(stage.from_step)[1])
        print(f"from step {stage.from_step}: {len(stage.names)} more, {total} {args.by}s in all")
    print(args.out)
    return 0
