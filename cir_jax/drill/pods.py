"""Faults of one of several processes: two, as on two hosts of a slice, each with a device."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from cir_jax import exits
from cir_jax.drill.bench import Bench, Job
from cir_jax.drill.faults import KILLED, Fault, Outcome, bound, tail

_TWO = {"num_processes": 2}
_MESH = "mesh.data=2"
_SAME = "resumed: same metrics to the bit"
_STALL_S = 60


def _baseline(bench: Bench) -> Path:
    """An undisturbed run of two processes, made on first use."""
    run_dir = bench.scratch / "baseline_of_two"
    if not run_dir.exists():
        ended = bench.run(run_dir, _MESH, **_TWO)
        if ended.codes != [0, 0]:
            raise RuntimeError(f"the job of two processes ended with {ended.codes}: {ended.text}")
    return run_dir


def _ends(
    codes: list[int],
    says: str,
    act: Callable[[Job], None] = lambda job: None,
    *,
    inject: str = "none",
    saves_lost: int = 1,
) -> Callable[[Bench], Outcome]:
    """Both processes end with these codes, say this, and go on when both are started again."""

    def try_it(bench: Bench) -> Outcome:
        baseline = _baseline(bench)
        run_dir = bench.new_dir()
        job = bench.start(
            run_dir, _MESH, f"hosts.stall_timeout_s={_STALL_S}", inject=inject, **_TWO
        )
        job.until(lambda: job.num_steps >= 3)
        began = time.monotonic()
        act(job)
        first = job.end()
        took_s = time.monotonic() - began
        second = bench.run(run_dir, _MESH, **_TWO)
        lost = first.num_steps - (second.resumed or 0)
        seen = f"ended after step {first.num_steps}, {took_s:.1f} s; went on from {second.resumed}"
        out = Outcome(run_dir, seen, [*first.codes, *second.codes], lost)
        if first.codes != codes:
            out.wrong.append(f"exit codes {first.codes}, expected {codes}: {tail(first)}")
        if says not in first.text:
            out.wrong.append(f"does not say {says!r}: {tail(first)}")
        if second.codes != [0, 0]:
            out.wrong.append(f"resumed, exit codes {second.codes}: {tail(second)}")
        elif different := bench.same_as_baseline(run_dir, baseline):
            out.wrong.append(different)
        bound(out, bench, saves_lost)
        return out

    return try_it


def _to(process: int, signum: int) -> Callable[[Job], None]:
    return lambda job: job.signal(signum, process)


FAULTS = (
    Fault(
        "two processes: kill -9 of the first",
        f"-9 and {exits.AGAIN}, naming it; {_SAME}",
        _ends([KILLED, exits.AGAIN], "process 0 is gone", _to(0, signal.SIGKILL), saves_lost=2),
    ),
    Fault(
        "two processes: kill -9 of the second",
        f"{exits.AGAIN} and -9, naming it; {_SAME}",
        _ends([exits.AGAIN, KILLED], "process 1 is gone", _to(1, signal.SIGKILL), saves_lost=2),
    ),
    Fault(
        "two processes: SIGTERM to the second",
        f"{exits.TERMINATED} of both, no step lost; {_SAME}",
        _ends([exits.TERMINATED] * 2, "was asked to stop", _to(1, signal.SIGTERM), saves_lost=0),
    ),
    Fault(
        "two processes: the second fails",
        f"{exits.AGAIN} and 1, saying why; {_SAME}",
        _ends(
            [exits.AGAIN, 1],
            "process 1 has ended: ZeroDivisionError",
            inject="process_1_fails",
            saves_lost=2,
        ),
    ),
    Fault(
        "two processes: the second is stuck",
        f"{exits.AGAIN} of both, naming it and its place; {_SAME}",
        _ends(
            [exits.AGAIN] * 2,
            "process 1 is stuck",
            inject="process_1_stalls",
            saves_lost=2,
        ),
    ),
)
