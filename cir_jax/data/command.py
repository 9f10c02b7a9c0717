"""`cir-jax data`: prepares, lists and shows data sets, compares them, audits the gym's graders."""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cir_jax.config import ColumnsConfig, ConfigError, DataConfig
from cir_jax.data import audit, gym, overlap, sets, sources, tasks
from cir_jax.data.problems import read_problems
from cir_jax.records import Problem

_DATA_DIR = DataConfig.model_fields["directory"].default


OpenGrader = Callable[[], contextlib.AbstractContextManager]


def add(commands: argparse._SubParsersAction, open_grader: OpenGrader) -> None:
    """open_grader: of answers in <<<>>>, what `audit` tries."""
    data = commands.add_parser(
        "data",
        help="prepare, list and show data sets; look for overlaps; audit graders",
        description="Data sets by name, for data.sets and data.eval_sets of a config.",
    )
    kinds = data.add_subparsers(required=True, metavar="COMMAND")

    prepare = kinds.add_parser(
        "prepare",
        help="make data sets from files here, or from downloads",
        description="Makes each data set NAME in DATA_DIR, from MANUAL_DIR/NAME.jsonl (or .json, "
        ".parquet; NAME/SPLIT.jsonl where there are several splits, NAME/TASK.json where there are "
        "several files), or from a download where there is no such file, and prints its splits.",
    )
    prepare.add_argument("names", metavar="NAME", nargs="+", help="all: every set that has a file")
    prepare.add_argument("--manual-dir", type=Path, metavar="DIR", help="where your files lie")
    prepare.set_defaults(run=_prepare)

    listing = kinds.add_parser("list", help="print all data sets and generated tasks")
    listing.set_defaults(run=_list)

    show = kinds.add_parser(
        "show",
        help="print problems of a data set or task",
        description="Prints the first problems of NAME[:SPLIT] or of a generated task as JSON, one "
        "a line, and on stderr how many there are.",
    )
    show.add_argument("name", metavar="NAME[:SPLIT]|TASK")
    show.add_argument("--num", type=int, default=3, help="problems to print (default: 3)")
    show.set_defaults(run=_show)

    overlaps = kinds.add_parser(
        "overlap",
        help="drop training problems that share text with held-out ones",
        description="Compares data sets (NAME[:SPLIT]) or files of problems by runs of words, "
        "prints counts and, with --out, writes OUT/kept.jsonl and OUT/dropped.jsonl, which a "
        "config's data.files can name with the columns question, answer and task.",
    )
    overlaps.add_argument("--train", nargs="+", required=True, metavar="SET|FILE")
    overlaps.add_argument("--against", nargs="+", required=True, metavar="SET|FILE")
    overlaps.add_argument("--ngram", type=int, default=13, help="words (default: 13)")
    overlaps.add_argument("--out", type=Path, metavar="DIR")
    for name in ("prompt", "answer", "source"):
        overlaps.add_argument(
            f"--{name}",
            default=ColumnsConfig.model_fields[name].default,
            metavar="COLUMN",
            help=f"of files, as data.columns.{name} (default: %(default)s, else what is usual)",
        )
    overlaps.set_defaults(run=_overlap)

    trial = kinds.add_parser(
        "audit",
        help="try the graders of Reasoning-Gym's tasks",
        description="Grades right, wrong, malformed and empty answers to problems of each task and "
        "prints what is not as it should be. The exit status is 1 if there is anything.",
    )
    trial.add_argument("names", metavar="TASK", nargs="*", help="(default: all)")
    trial.add_argument("--num", type=int, default=3, help="problems of each (default: 3)")
    trial.set_defaults(run=functools.partial(_audit, open_grader=open_grader))

    for command in (prepare, listing, show, overlaps):
        command.add_argument(
            "--data-dir",
            type=Path,
            default=Path(_DATA_DIR),
            metavar="DIR",
            help=f"where prepared sets lie, as data.directory (default: {_DATA_DIR})",
        )


def _prepare(args: argparse.Namespace) -> int:
    if args.manual_dir is not None and not args.manual_dir.is_dir():
        raise ConfigError(f"--manual-dir={str(args.manual_dir)!r}: no such directory")
    names = list(sets.SETS) if args.names == ["all"] else args.names
    for name in names:
        sets.find(name)
    from cir_jax.data import builder

    for name in names:
        # stdout has one line for each set.
        with contextlib.redirect_stdout(sys.stderr):
            counts = builder.prepare(name, args.data_dir, args.manual_dir)
        said = ", ".join(f"{split} {count}" for split, count in counts.items())
        print(f"{name}: {said} problems, {sets.folder(name, args.data_dir)}")
    return 0


def _list(args: argparse.Namespace) -> int:
    for name, its in sets.SETS.items():
        is_there = sets.folder(name, args.data_dir).is_dir()
        state = "prepared" if is_there else "not prepared"
        print(f"{name:18} {'/'.join(its.splits):12} {state:13} {its.summary} ({its.source})")
    print(f"\ngenerated tasks (data.tasks): {' '.join(tasks.names())}")
    print(f"\nleft out: {'; '.join(f'rg:{n} ({why})' for n, why in gym.EXCLUDED.items())}")
    return 0


def _show(args: argparse.Namespace) -> int:
    if args.name in tasks.names():
        problems: Sequence[Problem] = [tasks.problem(args.name, "rl", i) for i in range(args.num)]
        print(f"{args.name}: generated", file=sys.stderr)
    else:
        problems = sources.set_problems(args.name, "data show", str(args.data_dir))
        print(f"{args.name}: {len(problems)} problems", file=sys.stderr)
    for problem in problems[: args.num]:
        print(json.dumps(dataclasses.asdict(problem), ensure_ascii=False, default=str))
    return 0


def _overlap(args: argparse.Namespace) -> int:
    if args.ngram < 1:
        raise ConfigError(f"--ngram={args.ngram}: must be at least 1")
    train, held_out = (
        [problem for name in names for problem in _problems(name, args)]
        for names in (args.train, args.against)
    )
    found = overlap.find_overlaps(train, held_out, args.ngram)
    by_number = {its.number: its for its in found}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with (
            open(args.out / "kept.jsonl", "w", encoding="utf-8") as kept,
            open(args.out / "dropped.jsonl", "w", encoding="utf-8") as dropped,
        ):
            for number, problem in enumerate(train):
                row = dataclasses.asdict(problem)
                if its := by_number.get(number):
                    row |= {"overlaps_with": its.with_id, "shared_words": its.words}
                file = dropped if its else kept
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    print(
        f"{len(train)} training problems, {len(held_out)} held out: {len(found)} dropped, "
        f"{len(train) - len(found)} kept (runs of {args.ngram} words)"
    )
    return 0


def _problems(name: str, args: argparse.Namespace) -> list[Problem]:
    if name.partition(":")[0] in sets.SETS:
        return sources.set_problems(name, "data overlap", str(args.data_dir))
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"data overlap: {name!r}: neither a data set nor a file")
    columns = ColumnsConfig(prompt=args.prompt, answer=args.answer, source=args.source)
    return read_problems(path, columns)


def _audit(args: argparse.Namespace, open_grader: OpenGrader) -> int:
    for name in args.names:
        tasks.check_names([tasks.GYM + name.removeprefix(tasks.GYM)])
    names = [name.removeprefix(tasks.GYM) for name in args.names] or gym.names()
    with open_grader() as grader:
        results = [audit.audit(name, grader.submit, args.num) for name in names]
    for its in (its for its in results if not its.is_sound):
        print(its)
    unsound = sum(not its.is_sound for its in results)
    answers = sum(its.num_answers for its in results)
    print(f"{len(results)} tasks, {answers} answers: {unsound} tasks are not as they should be")
    return int(unsound > 0)
