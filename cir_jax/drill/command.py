"""The command `cir-jax drill`."""

import argparse
import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cir_jax import config as configs
from cir_jax.arguments import add_overrides, positive
from cir_jax.config import ConfigError

_COLUMNS = ("fault", "expected", "seen", "steps lost", "exit codes", "")


def add(commands) -> None:
    drill = commands.add_parser(
        "drill",
        help="try what happens when things go wrong",
        description="Runs a small job on the CPU with one fault after the other, compares what "
        "becomes of it with what the README says, and prints a table. Each ends with the same "
        "command as it began with, and has to come to the same metrics, byte for byte. Processes "
        "and temporary files that stay behind count as failures. The exit status is 0 if all is "
        "as expected. What needs a mount is skipped without root.",
    )
    drill.add_argument(
        "--only", metavar="TEXT", action="append", help="faults whose name has this in it"
    )
    drill.add_argument("--list", action="store_true", help="print the faults' names alone")
    drill.add_argument(
        "--keep", action="store_true", help="keep the run directories, and say where they are"
    )
    drill.add_argument(
        "--config",
        metavar="CONFIG",
        type=Path,
        help="TOML file of another job (default: a small one)",
    )
    drill.add_argument(
        "--kills", type=positive, default=3, help="of one run at random moments (default: 3)"
    )
    add_overrides(drill)
    drill.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from cir_jax.drill import bench as benches
    from cir_jax.drill import faults, pods
    from cir_jax.drill.faults import Skipped

    known = (*faults.FAULTS, *pods.FAULTS)
    chosen = [f for f in known if not args.only or any(text in f.name for text in args.only)]
    if not chosen:
        raise ConfigError(f"--only {args.only[0]}: no fault; there are {[f.name for f in known]}")
    if args.list:
        print("\n".join(f.name for f in chosen))
        return 0
    benches.adopt_orphans()
    scratch = Path(tempfile.mkdtemp(prefix="cir_jax_drill_"))
    console = Console(width=180)
    table = Table(*_COLUMNS)
    num_wrong = 0
    try:
        config = args.config or configs.asset_dir("package:drill.toml")
        bench = benches.Bench(scratch, config, args.overrides, num_kills=args.kills)
        for fault in chosen:
            try:
                out = fault.try_it(bench)
            except Skipped as why:
                row = (fault.name, fault.expected, f"skipped: {why}", "", "", "skipped")
            else:
                wrong = out.wrong + bench.left_over(out.run_dir)
                num_wrong += bool(wrong)
                seen = "; ".join([out.seen, *wrong])
                codes = " ".join(map(str, out.codes))
                verdict = "WRONG" if wrong else "ok"
                row = (fault.name, fault.expected, seen, str(out.lost), codes, verdict)
                if not args.keep:
                    shutil.rmtree(out.run_dir, ignore_errors=True)
            console.print(f"{fault.name}: {row[-1]}", markup=False, highlight=False)
            table.add_row(*row)
    finally:
        if args.keep:
            console.print(f"run directories: {scratch}", soft_wrap=True)
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    console.print(table)
    return int(num_wrong > 0)
