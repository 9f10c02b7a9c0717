"""The commands `cir-jax parity export` and `cir-jax parity check`."""

import argparse
from pathlib import Path

from cir_jax import config as configs
from cir_jax.arguments import above_zero, count, one_line_errors
from cir_jax.config import Config, ConfigError
from cir_jax.config.keys import toml_text
from cir_jax.data import sources
from cir_jax.parity.golden import SNIPPET, describe

EXIT_DIFFERS = 1


def add(commands) -> None:
    parity = commands.add_parser("parity", help="compare an update with veRL's, stage by stage")
    verbs = parity.add_subparsers(required=True, metavar="WHAT")
    _add_export(verbs)
    _add_check(verbs)


def _add_export(verbs) -> None:
    export = verbs.add_parser(
        "export",
        help="write a golden batch",
        description="Writes the batch of one RL step to OUT.npz: tokens, masks, rewards, "
        "log-probabilities, advantages, loss, gradient norms, by our code in float32. The weights "
        "are sft.weights of CONFIG, or the newest of RUN; export-hf writes them for veRL.",
        epilog=_layout(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("source", metavar="CONFIG|RUN", type=Path)
    export.add_argument("out", metavar="OUT.npz", type=Path)
    export.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="override of a config key; right after OUT.npz",
    )
    export.add_argument(
        "--rollouts",
        type=Path,
        metavar="FILE.jsonl",
        help="recorded ones, as a run's samples.jsonl has them (whole groups of them with a large "
        "samples_per_log), their scores as rewards; default: sampled now",
    )
    export.add_argument(
        "--step",
        type=count,
        help="of the recorded rollouts (default: the last), or that is sampled (default: 0)",
    )
    export.add_argument(
        "--off-policy",
        action="store_true",
        help="take the sampler's log-probabilities for the old ones: of an earlier step's "
        "rollouts, the ratios are not 1 then, and clips act",
    )
    export.set_defaults(run=_export)


def _add_check(verbs) -> None:
    check = verbs.add_parser(
        "check",
        help="compute a golden batch's quantities anew and compare",
        description="Computes each quantity of FILE by our code from the file's own inputs and "
        "prints its largest differences. The exit status is 1 if one is beyond its tolerance. "
        "What the file lacks, or what needs weights that are not given, is not compared.",
        epilog=_layout(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("file", metavar="FILE.npz", type=Path)
    check.add_argument(
        "--model",
        metavar="DIR|RUN",
        help="weights of the policy in the update, as Hugging Face directory or run: "
        "log-probabilities, entropy and gradient norms are compared, too",
    )
    check.add_argument("--reference", metavar="DIR|RUN", help="weights of the reference model")
    check.add_argument(
        "--tolerance-scale",
        type=above_zero,
        default=1.0,
        metavar="X",
        help="multiplies all tolerances, for a file of bfloat16 (100, say); default: 1",
    )
    check.set_defaults(run=_check)


def _layout() -> str:
    return (
        "arrays of the file, B rows, T tokens (prompt, padded on the left, and response), R "
        "tokens\nof the response (the last R of T), M mini-batches; every one is told of the "
        f"token itself:\n\n{describe()}\n\nfrom veRL:\n\n{SNIPPET}"
    )


def _export(args: argparse.Namespace) -> int:
    cfg, run_dir = _source(args)
    from cir_jax.parity.export import export
    from cir_jax.parity.golden import write

    with one_line_errors("parity export"):
        batch = export(cfg, run_dir, args.rollouts, args.step, args.off_policy)
        write(args.out, batch)
    print(args.out)
    return 0


def _source(args: argparse.Namespace) -> tuple[Config, Path | None]:
    """The config, and the run's directory if it is one's."""
    if args.source.is_dir():
        cfg, run_dir = configs.load_run(args.source), args.source
        cfg = configs.override(cfg, args.overrides)
    else:
        cfg, run_dir = configs.load(args.source, args.overrides), None
    if args.rollouts is None:
        sources.check(cfg.data)
    elif not args.rollouts.is_file():
        raise ConfigError(f"--rollouts {args.rollouts}: no such file")
    return cfg, run_dir


def _check(args: argparse.Namespace) -> int:
    from cir_jax.parity.golden import read, settings_of

    with one_line_errors("parity check"):
        batch = read(args.file)
        from cir_jax.parity.check import compare
        from cir_jax.parity.load import load_weights
        from cir_jax.parity.quantities import recompute

        with load_weights(args.model, args.reference) as weights:
            here = recompute(batch, weights)
    findings = compare(batch, here, weights, args.tolerance_scale)
    rows, tokens = len(batch["input_ids"]), int(batch.trained.sum())
    print(f"{args.file}: {rows} rows, {tokens} tokens in the loss")
    print(f"settings: {toml_text(settings_of(batch.rl))}")
    print(f"{'quantity':20}{'max abs':>10}{'max rel':>10}  tolerance")
    for f in findings:
        if not f.compared:
            print(f"{f.name:20}{'-':>10}{'-':>10}  not compared: {f.reason}")
            continue
        verdict = f"DIFFERS {f.reason}" if f.differs else "ok"
        allowed = f"{f.tolerance.absolute:.0e} + {f.tolerance.relative:.0e} x"
        print(f"{f.name:20}{f.largest:10.2g}{f.largest_relative:10.2g}  {allowed}  {verdict}")
    return EXIT_DIFFERS if any(f.differs for f in findings) else 0
