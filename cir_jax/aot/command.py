"""The command `cir-jax aot`: what a config's run needs of a TPU slice, before it is rented."""

import argparse
import json
import sys
from typing import Any

from cir_jax import config as configs
from cir_jax.aot.chips import CHIPS, Topology, topology
from cir_jax.arguments import above_zero, add_overrides, positive
from cir_jax.config import Config

EXIT_DOES_NOT_FIT = 3
EXIT_COMPILER = 4


def add(commands) -> None:
    aot = commands.add_parser(
        "aot",
        help="compile a run for a TPU slice that is not here, and say what it would take",
        description="Compiles every program of CONFIG's run for a TPU slice, without the slice and "
        "without network, and reports what fits into its memory and, by the compiler's estimates, "
        "what an RL step takes. Nothing is measured. Needs the extra `tpu`; each program takes up "
        "to minutes and 2 GiB the first time, and is then kept in ~/.cache/cir_jax/aot.",
        epilog="exit status: 0 it fits; 2 the config or an argument is wrong, or libtpu is "
        "missing; 3 it does not fit (on any slice, of several); 4 the compiler failed otherwise.",
    )
    aot.add_argument("config", metavar="CONFIG", help="TOML file of the run")
    where = aot.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--topology",
        metavar="KIND:AxB",
        help="slice in chips along its axes, such as v5e:4x4 or v5p:2x2x2; kinds: "
        + ", ".join(CHIPS)
        + "; where the config's mesh is for another number of devices, one for the slice's is made",
    )
    where.add_argument(
        "--topologies",
        metavar="A,B,...",
        help="a table to choose a slice by",
    )
    aot.add_argument(
        "--auto-fit",
        action="store_true",
        help="look for the lightest remat, the largest micro-batch, and the most slots that fit, "
        "and print the overrides",
    )
    aot.add_argument(
        "--prompt", type=positive, metavar="TOKENS", help="of a prompt (default: 1/4 of the limit)"
    )
    aot.add_argument(
        "--response",
        type=positive,
        metavar="TOKENS",
        help="of a response, in the mean (default: 3/10 of the limit)",
    )
    aot.add_argument("--price", type=above_zero, help="of a chip's hour")
    aot.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_overrides(aot)
    aot.set_defaults(run=_aot)


def _aot(args: argparse.Namespace) -> int:
    cfg = configs.load_alone(args.config, args.overrides)
    names = args.topologies.split(",") if args.topology is None else [args.topology]
    slices = [topology(name.strip()) for name in names]
    from cir_jax.aot import compilation, text

    compilation.check_installed()
    try:
        reports = [_report(args, cfg, where) for where in slices]
    except compilation.CompilerError as error:
        print(f"cir-jax: aot: {error}", file=sys.stderr)
        return EXIT_COMPILER
    if args.topology is None:
        print(json.dumps({"slices": reports}) if args.json else text.of_slices(reports))
    else:
        print(json.dumps(reports[0]) if args.json else text.of_report(reports[0]))
    fits = [report["fits"] for report in reports]
    for report in reports:
        for program in report["programs"]:
            if not program["fits"]:
                print(f"cir-jax: aot: {text.refusal(report, program)}", file=sys.stderr)
    return 0 if any(fits) else EXIT_DOES_NOT_FIT


def _report(args: argparse.Namespace, given: Config, where: Topology) -> dict[str, Any]:
    from cir_jax.aot import compilation, fit, lengths, report

    cfg = given
    if cfg.mesh.num_devices != where.num_devices:
        _note(
            f"mesh={cfg.mesh.shape} (data, fsdp, tensor): is of {cfg.mesh.num_devices} devices, "
            f"but {where.name} has {where.num_devices}; one for these is made, see the overrides"
        )
        cfg = fit.on_slice(cfg, where)
    means = lengths.default(cfg, args.prompt, args.response)
    if args.auto_fit:
        cfg = fit.fitted(cfg, where, means, _note)
    plan = compilation.plan(cfg, where)
    facts = {}
    for name in plan.programs:
        _note(f"{where.name}: {name} ...")
        facts[name] = compilation.compile_program(cfg, where, name)
    made = report.make(cfg, where, plan, facts, means, args.price)
    return made | {"overrides": fit.overrides(given, cfg)}


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
