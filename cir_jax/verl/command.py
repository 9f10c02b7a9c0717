"""The command `cir-jax import-verl`."""

import argparse
import os
import sys
from pathlib import Path

from cir_jax.arguments import one_line_errors
from cir_jax.config import ConfigError
from cir_jax.verl import hydra, shell
from cir_jax.verl.translate import Translation, to_toml, translate

_ORDER = ("unknown", "lacking", "approximated", "translated", "honoured", "ignored")
_TITLES = {"lacking": "no counterpart"}


def add(commands) -> None:
    importer = commands.add_parser(
        "import-verl",
        help="make a config of a veRL launch",
        description="Reads a veRL launch, from a shell script (which is not run) or from "
        "overrides, and writes our config for it. Says on stderr what became of each key: "
        "honoured, translated, approximated, ignored, or without a counterpart; a key that would "
        "change the result and has none, or is unknown, is an error.",
    )
    importer.add_argument(
        "launch",
        nargs="+",
        metavar="FILE|key=value",
        help='script, - is stdin, and arguments for it (its "$@"); or overrides alone',
    )
    importer.add_argument("-o", "--out", metavar="OUT", type=Path, help="default: stdout")
    importer.add_argument(
        "--var",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the script, whatever it assigns; others that it does not assign are "
        "looked up in the environment",
    )
    importer.add_argument(
        "--tasks",
        default="",
        metavar="NAME,...",
        help="task kinds to train on (data.tasks), in place of the launch's parquet files",
    )
    importer.add_argument(
        "--weights",
        default="",
        metavar="DIR",
        help="directory of the model's weights, as import-hf writes it (default: the launch's "
        "model if that is a directory here, else weights/PRESET)",
    )
    importer.add_argument(
        "--force", action="store_true", help="leave out what has no counterpart or is unknown"
    )
    importer.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> int:
    with one_line_errors("import-verl"):
        command, source = _command(args)
    translation = translate(
        command,
        tasks=tuple(filter(None, args.tasks.split(","))),
        weights=args.weights,
        name=Path(source).stem if source != "overrides" else "verl",
    )
    print(report(translation), file=sys.stderr)
    missing = translation.lines("unknown", "lacking")
    if missing and not args.force:
        raise ConfigError(
            f"import-verl: {len(missing)} without a counterpart, --force leaves them out: "
            + "; ".join(str(line) for line in missing)
        )
    text = to_toml(translation, header(translation, source, args.out))
    if args.out:
        with one_line_errors("import-verl"):
            args.out.write_text(text, encoding="utf-8")
        print(args.out)
    else:
        print(text, end="")
    return 0


def _command(args: argparse.Namespace) -> tuple[shell.Command, str]:
    """The launch, and where it is from."""
    first, *rest = args.launch
    if hydra.is_override(first):
        return shell.Command("main_ppo", tuple(args.launch)), "overrides"
    given = {}
    for variable in args.var:
        name, equals, value = variable.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--var {variable}: expected NAME=VALUE")
        given[name] = value
    script = sys.stdin.read() if first == "-" else Path(first).read_text(encoding="utf-8")
    source = "stdin" if first == "-" else Path(first).name
    return shell.training_command(script, rest, os.environ, given), source


def report(translation: Translation) -> str:
    """Every key of a launch, by what became of it."""
    parts = []
    for category in _ORDER:
        if lines := translation.lines(category):
            title = f"{_TITLES.get(category, category)} ({len(lines)}):"
            parts.append("\n".join([title, *(f"  {line}" for line in lines)]))
    return "\n".join(parts)


def header(translation: Translation, source: str, out: Path | None) -> list[str]:
    """The comment at the config's top: where it is from, and all that is not just the same."""
    lines = [
        f"From a veRL launch ({source}), by `cir-jax import-verl`.",
        "",
        f"  cir-jax train {out or 'CONFIG.toml'}",
        "",
        "Sizes that depend on the hardware ([mesh], rl.micro_rows, rollout.slots, sandbox and",
        "reward workers) have our defaults, for one device: set them for yours. Not yet run.",
    ]
    for category, title in (
        ("lacking", "Left out, although it changes the result:"),
        ("unknown", "Left out, unknown:"),
        ("approximated", "Approximated:"),
        ("translated", "Translated:"),
    ):
        if entries := translation.lines(category):
            lines += ["", title, *(f"  {entry}" for entry in entries)]
    return lines
