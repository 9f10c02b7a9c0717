"""Command line: cir-jax train | eval | chat | import-hf | ... | run | doctor | bench."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cir_jax import config as configs
from cir_jax.config import Config, ConfigError, SandboxConfig
from cir_jax.data import tasks
from cir_jax.sandbox.errors import SandboxError

# Exit codes: 2 is also argparse's own; 130 is a shell's for SIGINT.
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130

# Others that `bench decode` measures.
_AGAINST = ("transformers", "tunix")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ConfigError, SandboxError) as error:
        print(f"cir-jax: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print("cir-jax: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


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
    _add_overrides(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval",
        help="evaluate a run's newest checkpoint on the held-out problems",
        description="Evaluates the newest checkpoint of RUN_DIR and prints its table row.",
    )
    evaluate.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    _add_overrides(evaluate)
    evaluate.set_defaults(run=_eval)

    _add_chat(commands)

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

    tokenizer = commands.add_parser(
        "train-tokenizer",
        help="train the small tokenizer on a config's demonstrations",
        description="Trains a byte-level BPE tokenizer of model.vocab_size tokens on the texts "
        "of the config's demonstrations and writes it to OUT.",
    )
    tokenizer.add_argument("config", metavar="CONFIG")
    tokenizer.add_argument("out", metavar="OUT", type=Path)
    _add_overrides(tokenizer)
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
        "--timeout", type=_positive, help=f"seconds (default: {SandboxConfig().timeout_s:g})"
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

    bench = commands.add_parser("bench", help="measure speed; prints lines of JSON")
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    update = benches.add_parser(
        "update",
        help="gradients of a policy loss",
        description="Measures forward and backward pass of a policy loss in tokens/s, and model "
        "FLOPs as a share of what a large matrix product reaches on the same machine in the same "
        "run. Prints one line of JSON for each system measured.",
    )
    update.add_argument("--preset", default="bench", help="model (default: bench)")
    update.add_argument("--batch", type=_positive, default=4, help="rows (default: 4)")
    update.add_argument("--length", type=_positive, default=512, help="tokens a row (default: 512)")
    update.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    update.add_argument("--remat", choices=("none", "minimal", "full"), default="minimal")
    update.add_argument("--rounds", type=_positive, default=5, help="measurements (default: 5)")
    update.add_argument(
        "--against", choices=("torch",), help="measure transformers and torch too, in turn"
    )
    update.set_defaults(run=_bench_update)

    decode = benches.add_parser(
        "decode",
        help="sampling of tokens",
        description="Measures sampling in tokens/s: slots x new tokens by the seconds of the "
        "decode loop, prefill of the prompts included. Its limit is what memory's bandwidth or "
        "matrix products allow, whichever is less, as measured on the same machine in the same "
        "run. Prints one line of JSON for each system measured.",
    )
    of_model = decode.add_mutually_exclusive_group()
    of_model.add_argument("--preset", default="bench", help="model (default: bench)")
    of_model.add_argument(
        "--model", type=Path, metavar="DIR", help="Hugging Face directory, with its weights"
    )
    decode.add_argument("--slots", type=_positive, default=32, help="rows (default: 32)")
    decode.add_argument(
        "--prompt", type=_positive, default=64, help="tokens a prompt (default: 64)"
    )
    decode.add_argument(
        "--new", type=_positive, default=256, help="tokens sampled a row (default: 256)"
    )
    decode.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    decode.add_argument(
        "--top-p", type=_share, default=1.0, help="nucleus that is sampled from (default: 1, all)"
    )
    decode.add_argument("--rounds", type=_positive, default=3, help="measurements (default: 3)")
    decode.add_argument("--against", choices=(*_AGAINST, "all"), help="measure others too, in turn")
    decode.add_argument(
        "--python",
        default=sys.executable,
        metavar="PATH",
        help="interpreter that has Tunix (default: this one)",
    )
    decode.set_defaults(run=_bench_decode)
    _add_bench_rollout(benches)

    sandbox = benches.add_parser(
        "sandbox",
        help="programs",
        description="Measures how many programs per second the sandbox runs, and how long one "
        "takes. Prints lines of JSON.",
    )
    cores = len(os.sched_getaffinity(0))
    sandbox.add_argument(
        "--workers", type=_positive, default=cores, help=f"programs at once (default: {cores})"
    )
    sandbox.add_argument(
        "--num", type=_positive, default=300, help="programs of each load (default: 300)"
    )
    sandbox.add_argument(
        "--against", choices=("pebble",), help="measure a pool without isolation, too"
    )
    sandbox.set_defaults(run=_bench_sandbox)
    return parser


def _add_chat(commands) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk to a model, with its programs run",
        description="Answers questions, one a line, from the terminal or a pipe: text as it is "
        "sampled, programs run, their outputs put back. The prompt of a turn is the conversation "
        "so far. /reset forgets it, /exit or Ctrl-D ends, Ctrl-C stops an answer.",
    )
    chat.add_argument(
        "model",
        metavar="MODEL",
        help="run directory (its newest checkpoint; raw prompts, as in training), or Hugging Face "
        "directory (package:NAME for one that is shipped; in its chat template if it has one, "
        "thinking disabled)",
    )
    chat.add_argument("--tokenizer", metavar="DIR", help="of weights that have none with them")
    chat.add_argument(
        "--template",
        metavar="TEXT",
        help="of a question's text, in which {question} is replaced (default: the run's "
        "data.template; {question} in a chat template, else that and a newline)",
    )
    chat.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    chat.add_argument("--raw", action="store_true", help="no chat template")
    of_run = "(default: the run's, else {})"
    for name, kind, default, meaning in (
        ("temperature", _not_negative, "1", "divides the logits; 0 is greedy"),
        ("top-p", _share, "1", "nucleus that is sampled from; 1 is all"),
        ("top-k", _count, "0", "most likely tokens that are sampled from; 0 is all"),
        ("min-p", _part, "0", "least probability, as a share of the most likely token's"),
        ("max-calls", _count, "5", "programs an answer; a run's: as in its evaluation"),
        ("max-new", _positive, "4096", "tokens of an answer, outputs of programs included"),
        ("timeout", _above_zero, "5", "seconds of a program"),
    ):
        chat.add_argument(
            f"--{name}", type=kind, metavar="N", help=f"{meaning} {of_run.format(default)}"
        )
    chat.add_argument(
        "--context",
        type=_positive,
        metavar="N",
        help="tokens of a conversation (default: 4096, or fewer if the model has fewer)",
    )
    chat.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help=f"of decoding {of_run.format('float32')}"
    )
    chat.add_argument(
        "--seed", type=_count, default=0, metavar="N", help="of all random numbers (default: 0)"
    )
    chat.set_defaults(run=_chat)


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0")
    return number


def _part(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0 and at most 1")
    return number


def _add_bench_rollout(benches) -> None:
    rollout = benches.add_parser(
        "rollout",
        help="rows with calls, against a schedule in rounds",
        description="Decodes a trace whose turns and programs are of long-tailed lengths twice "
        "with the same random model and slots: by the engine, and in rounds in which everyone "
        "waits for the slowest and generation runs past the block, as in CIR's reference. Prints "
        "a line of JSON for each with rows/s, tokens decoded, the device's idle share and the "
        "host's work per segment, and one with the ratios. The more rows there are for the slots, "
        "the less everyone waits for the slowest, and the closer the ratio of rows/s comes to "
        "that of the tokens decoded.",
    )
    rollout.add_argument(
        "--trace", action="store_true", required=True, help="the kind of measurement; no other"
    )
    rollout.add_argument("--preset", default="bench-small", help="model (default: bench-small)")
    rollout.add_argument("--slots", type=_positive, default=64, help="(default: 64)")
    rollout.add_argument(
        "--rows", type=_positive, default=64, help="responses that begin together (default: 64)"
    )
    rollout.add_argument(
        "--batches",
        type=_positive,
        default=3,
        help="so many of these, one after the other, each by both schedules in turn (default: 3)",
    )
    rollout.add_argument("--seed", type=int, default=0, help="of the trace (default: 0)")
    rollout.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, p50, p99, of in (
        ("turn", 32.0, 320.0, "a model turn's tokens"),
        ("latency", 0.03, 3.0, "a program's seconds"),
    ):
        rollout.add_argument(
            f"--{name}",
            nargs=2,
            type=_above_zero,
            default=(p50, p99),
            metavar=("P50", "P99"),
            help=f"median and 99th percentile of {of} (default: {p50:g} {p99:g})",
        )
    rollout.add_argument(
        "--response",
        type=_positive,
        default=512,
        help="model and tool tokens a response at most (default: 512)",
    )
    rollout.set_defaults(run=_bench_rollout)


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="override of a config key; the value as in TOML, bare text is a string",
    )


# jax and everything on it is imported after the config has been read: a bad config fails at once.


def _load(args: argparse.Namespace) -> Config:
    cfg = configs.load(args.config, args.overrides)
    tasks.check_names(cfg.data.tasks)
    return cfg


def _train(args: argparse.Namespace) -> int:
    cfg = _load(args)
    from cir_jax.train.display import Display
    from cir_jax.train.loop import Interrupted, train

    display = Display()
    try:
        run_dir = train(cfg, display)
    except Interrupted:
        display.note("stopped; the state is saved: the same command with resume=true goes on")
        return EXIT_INTERRUPTED
    print(run_dir)
    return 0


def _eval(args: argparse.Namespace) -> int:
    cfg = configs.override(configs.load_run(args.run_dir), args.overrides)
    tasks.check_names(cfg.data.tasks)
    from cir_jax.train.display import Display
    from cir_jax.train.loop import evaluate_run

    evaluate_run(cfg, args.run_dir, Display())
    return 0


def _chat(args: argparse.Namespace) -> int:
    from cir_jax.chat.session import Options, chat

    chat(Options(**{k: v for k, v in vars(args).items() if k != "run"}))
    return 0


def _import(args: argparse.Namespace) -> int:
    from cir_jax.train import weights

    with _one_line_errors("import-hf"):
        weights.import_hf(args.source, args.out, args.dtype)
    print(args.out)
    return 0


def _export(args: argparse.Namespace) -> int:
    if configs.holds_weights(args.run_dir):
        from cir_jax.train import weights

        with _one_line_errors("export-hf"):
            weights.export_hf(args.run_dir, args.out)
    else:
        cfg = configs.load_run(args.run_dir)
        from cir_jax.train.loop import export_run

        with _one_line_errors("export-hf"):
            export_run(cfg, args.run_dir, args.out)
    print(args.out)
    return 0


@contextlib.contextmanager
def _one_line_errors(command: str) -> Iterator[None]:
    """What is wrong with files that the user names is no reason for a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(f"{command}: {error}") from error


def _train_tokenizer(args: argparse.Namespace) -> int:
    cfg = _load(args)
    from cir_jax.train.sft import train_tokenizer

    train_tokenizer(cfg, args.out)
    print(args.out)
    return 0


def _run(args: argparse.Namespace) -> int:
    from cir_jax.sandbox.pool import open_sandbox
    from cir_jax.sandbox.text import result_text

    cfg = SandboxConfig(num_workers=1, isolation=args.isolation)
    if args.timeout:
        cfg = cfg.model_copy(update={"timeout_s": float(args.timeout)})
    with _one_line_errors("run"):
        is_stdin = str(args.file) == "-"
        code = sys.stdin.read() if is_stdin else args.file.read_text(encoding="utf-8")
    with open_sandbox(cfg) as sandbox:
        result = sandbox.submit(code, seed=args.seed).result()
    if result.status == "infra":
        raise SandboxError(result.error)
    print(result_text(result))
    print(f"status: {result.status}, {result.wall_s:.3f} s", file=sys.stderr)
    return int(result.status != "ok")


def _doctor(args: argparse.Namespace) -> int:
    from cir_jax.sandbox.doctor import examine

    return int(not examine(args.isolation))


def _bench_sandbox(args: argparse.Namespace) -> int:
    from cir_jax.bench.sandbox import bench_sandbox

    bench_sandbox(workers=args.workers, num=args.num, against=args.against)
    return 0


def _bench_update(args: argparse.Namespace) -> int:
    from cir_jax.bench.update import bench_update

    bench_update(
        model=args.preset,
        batch=args.batch,
        length=args.length,
        dtype=args.dtype,
        remat=args.remat,
        rounds=args.rounds,
        against=args.against,
    )
    return 0


def _bench_decode(args: argparse.Namespace) -> int:
    from cir_jax.bench.decode import bench_decode

    others = {None: [], "all": list(_AGAINST)}
    with _one_line_errors("bench decode"):
        bench_decode(
            model=args.preset,
            directory=args.model,
            slots=args.slots,
            prompt=args.prompt,
            new=args.new,
            dtype=args.dtype,
            top_p=args.top_p,
            rounds=args.rounds,
            against=others.get(args.against, [args.against]),
            python=args.python,
        )
    return 0


def _bench_rollout(args: argparse.Namespace) -> int:
    from cir_jax.bench.rollout import bench_rollout
    from cir_jax.bench.trace import Lognormal, Trace

    with _one_line_errors("bench rollout"):
        bench_rollout(
            model=args.preset,
            slots=args.slots,
            rows=args.rows,
            batches=args.batches,
            seed=args.seed,
            dtype=args.dtype,
            trace=Trace(
                turn=Lognormal(*args.turn),
                latency_s=Lognormal(*args.latency),
                max_response=args.response,
                timeout_s=SandboxConfig().timeout_s,
            ),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
