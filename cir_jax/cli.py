"""Command line: cir-jax train | sft | collect | curriculum | eval | chat | ... | bench."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from cir_jax import config as configs
from cir_jax import diff_runs, exits
from cir_jax.ablation import command as ablation_command
from cir_jax.aot import command as aot_command
from cir_jax.arguments import add_overrides, one_line_errors, positive
from cir_jax.bench import commands as bench_commands
from cir_jax.chat import command as chat_command
from cir_jax.collect import command as collect_command
from cir_jax.config import Config, ConfigError, ResultConfig, RewardConfig, SandboxConfig
from cir_jax.data import command as data_command
from cir_jax.data import sources
from cir_jax.drill import command as drill_command
from cir_jax.evaluation import command as evaluation_command
from cir_jax.exits import Interrupted
from cir_jax.parity import command as parity_command
from cir_jax.report import command as report_command
from cir_jax.reward.score import Grader
from cir_jax.sandbox.errors import SandboxError
from cir_jax.train.stopping import exit_code
from cir_jax.verl import command as verl_command

EXIT_CONFIG, EXIT_INTERRUPTED = exits.USER, exits.INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """argv: None: the program's own, which this ends if anything is wrong."""
    try:
        code = _main(argv)
    except Exception:
        if argv is not None:
            raise
        traceback.print_exc()
        code = 1
    if argv is None and code:
        # A thread that waits for a store that has failed would be waited for, without end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    args = _parsed(argv)
    try:
        return args.run(args)
    except BaseException as error:
        if (code := exit_code(error)) is None:
            raise
        said = {Interrupted: "stopped; the state is saved: resume=true goes on"}
        said[KeyboardInterrupt] = "interrupted"
        print(f"cir-jax: {said.get(type(error), error)}", file=sys.stderr)
        return code


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse finds overrides beside the other positional arguments, not behind an option.
    behind = [word for word in rest if "=" in word and not word.startswith("-")]
    if "overrides" in args:
        args.overrides = [*args.overrides, *behind]
        rest = [word for word in rest if word not in behind]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cir-jax", description="Train and evaluate code-integrated reasoning."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train as a config says",
        description="Trains as CONFIG says and prints the run directory last.",
        epilog="keys of a config, each with its default and meaning:\n" + configs.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", metavar="CONFIG", help="TOML file of the run")
    add_overrides(train)
    _add_differs(train)
    train.set_defaults(run=_train)

    sft = commands.add_parser(
        "sft",
        help="fine-tune on trajectories, tool tokens masked",
        description="The SFT phase of `train` alone: fine-tunes as [sft] of CONFIG says, on "
        "trajectories from files (sft.data) or a generator, and prints the run directory last. "
        "`cir-jax train` goes on from it: with resume=true in the same directory, or in another "
        "run with sft.weights=RUN_DIR.",
    )
    sft.add_argument("config", metavar="CONFIG", help="TOML file of the run")
    add_overrides(sft)
    _add_differs(sft)
    sft.set_defaults(run=_sft)

    collect_command.add(commands)

    evaluation_command.add(commands)
    data_command.add(commands, lambda: Grader(cfg=RewardConfig(answer_format="angles")))
    ablation_command.add(commands)
    diff_runs.add(commands)
    drill_command.add(commands)
    report_command.add(commands)
    chat_command.add(commands)

    importer = commands.add_parser(
        "import-hf",
        help="read published weights",
        description="Reads Qwen2.5 or Qwen3 weights from a Hugging Face directory, or from the "
        "hub, checks them and writes them with config and tokenizer to the directory OUT, which "
        "sft.weights and tokenizer of a config, and export-hf, take. One tensor at a time: memory "
        "need not hold the model.",
    )
    importer.add_argument("source", metavar="DIR|HUB_ID")
    importer.add_argument("out", metavar="OUT", type=Path)
    importer.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type that the weights are kept in (default: float32)",
    )
    importer.set_defaults(run=_import)

    export = commands.add_parser(
        "export-hf",
        help="write a run's newest weights for transformers",
        description="Writes the newest checkpoint of RUN_DIR, or the weights of a directory made "
        "by import-hf, as a Hugging Face directory OUT.",
    )
    export.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    export.add_argument("out", metavar="OUT", type=Path)
    export.set_defaults(run=_export)

    aot_command.add(commands)
    verl_command.add(commands)
    parity_command.add(commands)

    tokenizer = commands.add_parser(
        "train-tokenizer",
        help="train the small tokenizer on a config's demonstrations",
        description="Trains a byte-level BPE tokenizer of model.vocab_size tokens on the texts "
        "of the config's demonstrations and writes it to OUT.",
    )
    tokenizer.add_argument("config", metavar="CONFIG")
    tokenizer.add_argument("out", metavar="OUT", type=Path)
    add_overrides(tokenizer)
    tokenizer.set_defaults(run=_train_tokenizer)

    runner = commands.add_parser(
        "run",
        help="run one program in the sandbox",
        description="Runs FILE in the sandbox and prints what a model would read of it. Its "
        "status and time go to stderr. The exit status is 0 if the program's was.",
    )
    runner.add_argument("file", metavar="FILE.py", type=Path, help="program; - is stdin")
    runner.add_argument("--seed", type=int, default=0, help="of its random numbers (default: 0)")
    runner.add_argument(
        "--timeout", type=positive, help=f"seconds (default: {SandboxConfig().timeout_s:g})"
    )
    runner.add_argument(
        "--url", type=_service_url, default="", help="of a service that runs it, as sandbox.url"
    )
    runner.set_defaults(run=_run)

    doctor = commands.add_parser(
        "doctor",
        help="say whether the sandbox works on this machine",
        description="Prints what of this machine decides how programs can be isolated, and runs "
        "the attacks that the sandbox has to withstand. The exit status is 0 if it does.",
    )
    doctor.set_defaults(run=_doctor)
    for command in (runner, doctor):
        command.add_argument(
            "--isolation",
            choices=("namespaces", "landlock"),
            default=SandboxConfig().isolation,
            help="as the key sandbox.isolation (default: %(default)s)",
        )
        command.add_argument(
            "--runtime",
            default=SandboxConfig().runtime,
            metavar="DIR",
            help="as the key sandbox.runtime (default: the user's cache)",
        )

    builder = commands.add_parser(
        "build-runtime",
        help="install the packages that programs can import",
        description="Makes a virtual environment of pinned packages for programs, apart from the "
        "trainer's, and prints its directory. What runs programs does so by itself when it is "
        "first needed; with DIR, the key sandbox.runtime has to name it. pip's own settings (an "
        "index, a folder of wheels) count.",
    )
    builder.add_argument(
        "dir", metavar="DIR", nargs="?", default="", help="(default: the user's cache)"
    )
    builder.set_defaults(run=_build_runtime)

    bench_commands.add(commands)
    return parser


def _add_differs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--override",
        dest="differs",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="with resume=true: go on although this key, or section, is not what the run was made "
        "with; all allows any; may be given again",
    )


def _service_url(text: str) -> str:
    try:
        return SandboxConfig(url=text).url
    except ValueError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise argparse.ArgumentTypeError(f"{text}: {reason}") from error


# jax and everything on it is imported after the config has been read: a bad config fails at once.


def _load(args: argparse.Namespace) -> Config:
    cfg = configs.load(args.config, args.overrides)
    if getattr(args, "differs", ()):
        allowed = [*cfg.resume_override, *(given.partition("=")[0] for given in args.differs)]
        values = [given for given in args.differs if "=" in given]
        cfg = configs.with_values(configs.override(cfg, values), {"resume_override": allowed})
    sources.check(cfg.data)
    return cfg


def _train(args: argparse.Namespace) -> int:
    return _run_phases(_load(args))


def _sft(args: argparse.Namespace) -> int:
    cfg = _load(args)
    if not cfg.sft.trains:
        raise ConfigError("sft.steps=0: must be above 0, or sft.epochs must")
    return _run_phases(configs.override(cfg, ["rl.steps=0"]))


def _run_phases(cfg: Config) -> int:
    from cir_jax import hosts
    from cir_jax.train import preflight
    from cir_jax.train.display import Display
    from cir_jax.train.loop import train

    with preflight.with_others(cfg):
        try:
            run_dir = train(cfg, Display(quiet=not hosts.is_first()))
        except OSError as error:
            if (known := exits.storage_error(error)) is None:
                raise
            raise known from error
        if hosts.is_first():
            print(run_dir)
    return 0


def _import(args: argparse.Namespace) -> int:
    from cir_jax.train import weights

    with one_line_errors("import-hf"):
        weights.import_hf(args.source, args.out, args.dtype)
    print(args.out)
    return 0


def _export(args: argparse.Namespace) -> int:
    if configs.holds_weights(args.run_dir):
        from cir_jax.train import weights

        with one_line_errors("export-hf"):
            weights.export_hf(args.run_dir, args.out)
    else:
        cfg = configs.load_run(args.run_dir)
        from cir_jax.train.loop import export_run

        with one_line_errors("export-hf"):
            export_run(cfg, args.run_dir, args.out)
    print(args.out)
    return 0


def _train_tokenizer(args: argparse.Namespace) -> int:
    cfg = _load(args)
    from cir_jax.train.sft import train_tokenizer

    train_tokenizer(cfg, args.out)
    print(args.out)
    return 0


def _run(args: argparse.Namespace) -> int:
    from cir_jax.sandbox.pool import open_sandbox
    from cir_jax.sandbox.text import result_text

    cfg = SandboxConfig(
        num_workers=1,
        isolation=args.isolation,
        runtime=args.runtime,
        url=args.url,
        max_requests=1,
    )
    if args.timeout:
        cfg = cfg.model_copy(update={"timeout_s": float(args.timeout)})
    with one_line_errors("run"):
        is_stdin = str(args.file) == "-"
        code = sys.stdin.read() if is_stdin else args.file.read_text(encoding="utf-8")
    with open_sandbox(cfg) as sandbox:
        result = sandbox.submit(code, seed=args.seed).result()
    if result.status == "infra":
        raise SandboxError(result.error)
    print(result_text(result, ResultConfig()))
    print(f"status: {result.status}, {result.wall_s:.3f} s", file=sys.stderr)
    return int(result.status != "ok")


def _doctor(args: argparse.Namespace) -> int:
    from cir_jax.sandbox.doctor import examine

    return int(not examine(args.isolation, args.runtime))


def _build_runtime(args: argparse.Namespace) -> int:
    from cir_jax.sandbox import packages

    print(packages.find(args.dir).folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
