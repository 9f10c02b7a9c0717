"""The commands `cir-jax eval` and `cir-jax analyse`."""

import argparse
import sys
from pathlib import Path

from cir_jax.analyses import ANALYSES, load
from cir_jax.arguments import add_overrides, count, one_line_errors, positive
from cir_jax.config import ConfigError
from cir_jax.evals.benchmarks import path_of
from cir_jax.evals.suites import BENCHMARKS, PROMPTS, SUITES, Suite, find_suite, pick
from cir_jax.evaluation.results import analyses_of, as_text, can_draw, show, write


def add(commands) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="evaluate a model: benchmarks, with tools and without, or a run's held-out problems",
        usage="cir-jax eval MODEL|RUN|CONFIG [key.path=value ...] [--suite NAME|FILE] [options]",
        description="Asks a model the problems of a suite, keeps every sample in a directory and "
        "prints the tables. Without --suite: the held-out problems of a run, greedily. The same "
        "command goes on where it was stopped, with the same result; once there is one, it prints "
        "it again.",
        epilog=f"suites: {', '.join(SUITES)}; benchmarks: {', '.join(b.name for b in BENCHMARKS)}",
    )
    evaluate.add_argument(
        "model",
        metavar="MODEL|RUN|CONFIG",
        help="directory of weights (or package:NAME), run directory (its newest checkpoint), or "
        "TOML file (its sft.weights, or random weights if it has none)",
    )
    # Beside the first one: argparse does not find them behind an option.
    add_overrides(evaluate)
    evaluate.add_argument(
        "--suite",
        metavar="NAME|FILE",
        help="one of the suites below, or a TOML file with the fields of cir_jax/evals/suites.py",
    )
    evaluate.add_argument(
        "--benchmarks", metavar="NAME", nargs="+", help="these alone, in this order"
    )
    evaluate.add_argument(
        "--data-dir",
        metavar="DIR",
        type=Path,
        default=Path("data/benchmarks"),
        help="where the benchmarks' files are (default: %(default)s)",
    )
    evaluate.add_argument(
        "--tools",
        choices=("on", "off", "both"),
        help="the suite's prompt with code and its budget, that without code, or both on the same "
        "random numbers, compared (default: both with a suite, else on)",
    )
    evaluate.add_argument(
        "--budgets",
        metavar="N",
        nargs="+",
        type=count,
        default=(),
        help="with tools, also at most so many programs, for example 0 1 2 4 8",
    )
    evaluate.add_argument(
        "--counterfactual",
        action="store_true",
        help="take up each response again at each of its calls, with the tool on, off, and with "
        "another output",
    )
    for name, kind, meaning in (
        ("samples", positive, "samples of each problem (default: the suite's; greedy ones are 1)"),
        ("problems", positive, "the first so many of each benchmark (default: all)"),
        ("max-calls", count, "programs a response, with tools (default: the suite's)"),
        ("max-response-tokens", positive, "of model and tool (default: the suite's)"),
        ("part", positive, "problems that are asked and written at a time (default: by the slots)"),
    ):
        evaluate.add_argument(f"--{name}", type=kind, metavar="N", help=meaning)
    evaluate.add_argument(
        "--code-prompt",
        metavar="NAME|TEXT",
        help=f"in place of the suite's: {', '.join(PROMPTS)}, config (its data.template), or a "
        "text with {question}",
    )
    evaluate.add_argument(
        "--out", metavar="DIR", type=Path, help="(default: RUN/evals/..., or runs/evals/...)"
    )
    evaluate.set_defaults(run=_eval)

    analyse = commands.add_parser(
        "analyse",
        help="make tables and figures of evaluations and runs",
        description="Reads evaluation directories and run directories, in the order of time, and "
        "prints what can be said of them as Markdown tables.",
        epilog="analyses: " + ", ".join(ANALYSES),
    )
    analyse.add_argument("dirs", metavar="DIR", nargs="+", type=Path)
    analyse.add_argument(
        "--only", metavar="NAME", nargs="+", choices=tuple(ANALYSES), help="these alone"
    )
    analyse.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        help="also write tables and figures there (figures need pip install -e '.[figures]')",
    )
    analyse.set_defaults(run=_analyse)


def _eval(args: argparse.Namespace) -> int:
    from cir_jax.evaluation.model import find_model

    suite = _suite(args)
    files, values = [], {}
    if suite is not None:
        files = [path_of(benchmark, args.data_dir) for benchmark in suite.benchmarks]
        values = {
            "rollout.max_response_tokens": suite.max_response_tokens,
            # The clock has no say in what a benchmark comes to.
            "rollout.row_timeout_s": 1e7,
            "rollout.step_timeout_s": 1e7,
        }
    if args.max_response_tokens:
        values["rollout.max_response_tokens"] = args.max_response_tokens
    model = find_model(args.model, values, args.overrides, files)
    if suite is not None and args.code_prompt == "config":
        suite = suite.model_copy(update={"code_prompt": model.cfg.data.template})
    if suite is None and not args.problems and not model.cfg.eval.num_problems:
        raise ConfigError("eval.num_problems=0: must be above 0 to evaluate")

    from cir_jax.evaluation.run import Request, evaluate
    from cir_jax.train.display import Display

    request = Request(
        suite=suite,
        data_dir=args.data_dir,
        tools=args.tools or ("on" if suite is None else "both"),
        budgets=tuple(args.budgets),
        counterfactual=args.counterfactual,
        samples=args.samples,
        problems=args.problems,
        max_calls=args.max_calls,
        part=args.part,
    )
    display = Display()
    with one_line_errors("eval"):
        out = evaluate(model, request, args.out, display)
    show(out, display)
    return 0


def _suite(args: argparse.Namespace) -> Suite | None:
    """As the command line changes it."""
    if args.suite is None:
        for name in ("benchmarks", "code_prompt"):
            if getattr(args, name):
                raise ConfigError(f"--{name.replace('_', '-')}: only with --suite")
        return None
    suite = find_suite(args.suite)
    if args.benchmarks:
        suite = pick(suite, args.benchmarks)
    if args.code_prompt and args.code_prompt != "config":
        text = PROMPTS.get(args.code_prompt, args.code_prompt)
        if "{question}" not in text:
            raise ConfigError(
                f"--code-prompt {args.code_prompt!r}: must be one of {', '.join(PROMPTS)}, config, "
                "or a text with {question}"
            )
        suite = suite.model_copy(update={"code_prompt": text})
    return suite


def _analyse(args: argparse.Namespace) -> int:
    with one_line_errors("analyse"):
        saved = load(args.dirs)
    made = analyses_of(saved, args.only or ANALYSES)
    if missing := [name for name in args.only or () if name not in made]:
        raise ConfigError(f"--only {missing[0]}: nothing is saved in DIR that it could be made of")
    print(as_text(made))
    if args.out is not None:
        if not can_draw():
            print("no figures: they need pip install -e '.[figures]'", file=sys.stderr)
        with one_line_errors("analyse"):
            write(made, args.out, figures=can_draw())
    return 0
