"""The commands `cir-jax bench ...`."""

import argparse
import os
import sys
from pathlib import Path

from cir_jax.arguments import above_zero, one_line_errors, positive, share
from cir_jax.config import SandboxConfig

# Others that `bench decode` measures.
_AGAINST = ("transformers", "tunix")


def add(commands) -> None:
    bench = commands.add_parser("bench", help="measure speed; prints lines of JSON")
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    _add_update(benches)
    _add_decode(benches)
    _add_rollout(benches)
    _add_sandbox(benches)
    _add_save(benches)


def _add_update(benches) -> None:
    update = benches.add_parser(
        "update",
        help="gradients of a policy loss",
        description="Measures forward and backward pass of a policy loss in tokens/s, and model "
        "FLOPs as a share of what a large matrix product reaches on the same machine in the same "
        "run. Prints one line of JSON for each system measured.",
    )
    update.add_argument("--preset", default="bench", help="model (default: bench)")
    update.add_argument("--batch", type=positive, default=4, help="rows (default: 4)")
    update.add_argument("--length", type=positive, default=512, help="tokens a row (default: 512)")
    update.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    update.add_argument("--remat", choices=("none", "minimal", "full"), default="minimal")
    update.add_argument("--rounds", type=positive, default=5, help="measurements (default: 5)")
    update.add_argument(
        "--against", choices=("torch",), help="measure transformers and torch too, in turn"
    )
    update.set_defaults(run=_bench_update)


def _add_decode(benches) -> None:
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
    decode.add_argument("--slots", type=positive, default=32, help="rows (default: 32)")
    decode.add_argument("--prompt", type=positive, default=64, help="tokens a prompt (default: 64)")
    decode.add_argument(
        "--new", type=positive, default=256, help="tokens sampled a row (default: 256)"
    )
    decode.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    decode.add_argument(
        "--top-p", type=share, default=1.0, help="nucleus that is sampled from (default: 1, all)"
    )
    decode.add_argument("--rounds", type=positive, default=3, help="measurements (default: 3)")
    decode.add_argument("--against", choices=(*_AGAINST, "all"), help="measure others too, in turn")
    decode.add_argument(
        "--python",
        default=sys.executable,
        metavar="PATH",
        help="interpreter that has Tunix (default: this one)",
    )
    decode.set_defaults(run=_bench_decode)


def _add_rollout(benches) -> None:
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
    rollout.add_argument("--slots", type=positive, default=64, help="(default: 64)")
    rollout.add_argument(
        "--rows", type=positive, default=64, help="responses that begin together (default: 64)"
    )
    rollout.add_argument(
        "--batches",
        type=positive,
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
            type=above_zero,
            default=(p50, p99),
            metavar=("P50", "P99"),
            help=f"median and 99th percentile of {of} (default: {p50:g} {p99:g})",
        )
    rollout.add_argument(
        "--response",
        type=positive,
        default=512,
        help="model and tool tokens a response at most (default: 512)",
    )
    rollout.set_defaults(run=_bench_rollout)


def _add_sandbox(benches) -> None:
    sandbox = benches.add_parser(
        "sandbox",
        help="programs",
        description="Measures how many programs per second the sandbox runs, and how long one "
        "takes. Prints lines of JSON.",
    )
    cores = len(os.sched_getaffinity(0))
    sandbox.add_argument(
        "--workers", type=positive, default=cores, help=f"programs at once (default: {cores})"
    )
    sandbox.add_argument(
        "--num", type=positive, default=300, help="programs of each load (default: 300)"
    )
    sandbox.add_argument(
        "--against", choices=("pebble",), help="measure a pool without isolation, too"
    )
    sandbox.set_defaults(run=_bench_sandbox)


def _add_save(benches) -> None:
    save = benches.add_parser(
        "save",
        help="checkpoints beside steps",
        description="Measures by how much longer a step takes when a checkpoint is saved at its "
        "beginning, and the digest of the parameters that each step writes down. A step here is "
        "its updates alone. Prints one line of JSON.",
    )
    save.add_argument("--preset", default="bench", help="model (default: bench)")
    save.add_argument("--batch", type=positive, default=4, help="rows (default: 4)")
    save.add_argument("--length", type=positive, default=512, help="tokens a row (default: 512)")
    save.add_argument("--updates", type=positive, default=2, help="of a step (default: 2, CIR's)")
    save.add_argument("--rounds", type=positive, default=6, help="measurements (default: 6)")
    save.set_defaults(run=_bench_save)


def _bench_save(args: argparse.Namespace) -> int:
    from cir_jax.bench.save import bench_save

    bench_save(
        model=args.preset,
        batch=args.batch,
        length=args.length,
        updates=args.updates,
        rounds=args.rounds,
    )
    return 0


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
    with one_line_errors("bench decode"):
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

    with one_line_errors("bench rollout"):
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
