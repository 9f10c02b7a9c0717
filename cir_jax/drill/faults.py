"""The faults of the drill: what is done, and how the job has to end. The README's table says so."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cir_jax import exits, metrics
from cir_jax.drill import bench as benches
from cir_jax.drill.bench import Bench, Ended

KILLED = -signal.SIGKILL
# Moments of a start that are tried, seconds.
_START_S = 15.0
_SANDBOX, _GRADER = "cir_jax sandbox", "cir_jax.reward.worker"


class Skipped(Exception):
    """The fault cannot be brought about on this machine; the message says why."""


@dataclasses.dataclass
class Outcome:
    """seen: in words. codes: of the starts, in order. lost: steps that had to be made again.
    wrong: what is not as it should be."""

    run_dir: Path
    seen: str
    codes: list[int]
    lost: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Fault:
    name: str
    expected: str
    try_it: Callable[[Bench], Outcome]


def _goes_on(
    bench: Bench, first: Ended, run_dir: Path, code: int, *overrides: str, saves_lost: int = 1
) -> Outcome:
    """The start that a fault ended, and the same command once more, to the end."""
    second = bench.run(run_dir, *overrides)
    lost = first.num_steps - (second.resumed or 0)
    out = Outcome(run_dir, "", [first.code, second.code], lost)
    if first.code != code:
        out.wrong.append(f"exit code {first.code}, expected {code}: {tail(first)}")
    if second.code != 0:
        out.wrong.append(f"resumed, exit code {second.code}: {tail(second)}")
    elif different := bench.same_as_baseline(run_dir):
        out.wrong.append(different)
    bound(out, bench, saves_lost)
    out.seen = f"ended after step {first.num_steps}, went on from {second.resumed}"
    return out


def bound(out: Outcome, bench: Bench, saves_lost: int) -> None:
    """saves_lost: so many saves, the one under way among them, may not be there."""
    most = saves_lost * bench.every
    if out.lost > most:
        out.wrong.append(f"{out.lost} steps lost, at most {most} expected")


def _stays(bench: Bench, ended: Ended, run_dir: Path, *, same: bool = True) -> Outcome:
    """The job has to take no notice."""
    out = Outcome(run_dir, "went on", [ended.code])
    if ended.code != 0:
        out.wrong.append(f"exit code {ended.code}: {tail(ended)}")
    elif same and (different := bench.same_as_baseline(run_dir)):
        out.wrong.append(different)
    return out


def tail(ended: Ended) -> str:
    return " / ".join(ended.text.strip().splitlines()[-2:])


def kill(bench: Bench) -> Outcome:
    """One run again and again, at random moments of its start and, more often, of its steps. The
    last save may be under way."""
    run_dir, codes, seen = bench.new_dir(), [], []
    for left in range(bench.num_kills, 0, -1):
        steps = metrics.num_steps(run_dir)
        job = bench.start(run_dir)
        if random.random() < 0.7:
            stretch = 2 * (bench.num_steps - steps) / (left + 1)
            target = steps + random.uniform(0, stretch)
            job.until(lambda job=job, target=target: job.num_steps >= target)
            pause_s = random.uniform(0, bench.step_s)
        else:
            pause_s = random.uniform(0, _START_S)
        began = time.monotonic()
        job.until(lambda since=began, pause_s=pause_s: time.monotonic() - since > pause_s)
        job.signal(signal.SIGKILL)
        ended = job.end()
        codes.append(ended.code)
        seen.append(str(ended.num_steps))
        if ended.code != KILLED:
            break
    steps = metrics.num_steps(run_dir)
    last = bench.run(run_dir)
    lost = steps - (last.resumed or 0)
    killed = f"killed {codes.count(KILLED)} times, after steps {' '.join(seen)}"
    out = Outcome(run_dir, killed, [*codes, last.code], lost)
    if last.code != 0 or any(code not in (KILLED, 0) for code in codes):
        out.wrong.append(f"exit codes {out.codes}: {tail(last)}")
    elif different := bench.same_as_baseline(run_dir):
        out.wrong.append(different)
    bound(out, bench, 2)
    return out


def kill_saver(bench: Bench) -> Outcome:
    """While a checkpoint is half-written."""
    run_dir = bench.new_dir()
    job = bench.start(run_dir)
    folder = run_dir / benches.CHECKPOINTS

    def is_saving() -> bool:
        return job.num_steps >= 4 and any(folder.glob("*orbax-checkpoint-tmp*"))

    job.until(is_saving)
    job.signal(signal.SIGKILL)
    return _goes_on(bench, job.end(), run_dir, KILLED, saves_lost=2)


def _after_steps(bench: Bench, count: int, act: Callable, **options) -> tuple[Ended, Path]:
    run_dir = bench.new_dir()
    job = bench.start(run_dir, **options)
    job.until(lambda: job.num_steps >= count)
    act(job)
    return job.end(), run_dir


def _to_workers(kind: str, signum: int) -> Callable[[Bench], Outcome]:
    def act(job: benches.Job) -> None:
        for pid in job.workers(kind):
            try:
                os.kill(pid, signum)
            except ProcessLookupError:
                pass

    return lambda bench: _stays(bench, *_after_steps(bench, 2, act))


def terminate(bench: Bench) -> Outcome:
    began = []

    def act(job: benches.Job) -> None:
        time.sleep(random.uniform(0, 0.5))
        began.append(time.monotonic())
        job.signal(signal.SIGTERM)

    ended, run_dir = _after_steps(bench, 3, act)
    took_s = time.monotonic() - began[0]
    out = _goes_on(bench, ended, run_dir, exits.TERMINATED, saves_lost=0)
    out.seen += f", {took_s:.1f} s after the signal"
    return out


def _asked_by(signum: int, code: int) -> Callable[[Bench], Outcome]:
    def try_it(bench: Bench) -> Outcome:
        ended, run_dir = _after_steps(bench, 3, lambda job: job.signal(signum))
        return _goes_on(bench, ended, run_dir, code, saves_lost=0)

    return try_it


def _damaged(damage: Callable[[Path], None]) -> Callable[[Bench], Outcome]:
    """The newest checkpoint of a killed job."""

    def try_it(bench: Bench) -> Outcome:
        run_dir = bench.new_dir()
        job = bench.start(run_dir)
        job.until(lambda: len(benches.checkpoints(run_dir)) >= 2 and job.num_steps >= 5)
        job.signal(signal.SIGKILL)
        first = job.end()
        newest = benches.checkpoints(run_dir)[-1]
        damage(newest)
        out = _goes_on(bench, first, run_dir, KILLED, saves_lost=3)
        out.seen += f"; {newest.name} was the newest"
        return out

    return try_it


def _largest(checkpoint: Path) -> Path:
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(checkpoint: Path) -> None:
    path = _largest(checkpoint)
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(checkpoint: Path) -> None:
    """In the arrays' own bytes: the file's middle."""
    path = _largest(checkpoint)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << random.randrange(8)]))


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def lose_item(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "state")


def directory_lost(bench: Bench) -> Outcome:
    """As on a machine that was made anew: checkpoints are in a store, all else is gone."""
    run_dir, store = bench.new_dir(), bench.new_dir()
    where = f"checkpoint.dir={str(store)!r}"
    job = bench.start(run_dir, where)
    job.until(lambda: job.num_steps >= 5)
    job.signal(signal.SIGKILL)
    first = job.end()
    shutil.rmtree(run_dir)
    second = bench.run(run_dir, where)
    resumed = second.resumed or 0
    seen = f"ended after step {first.num_steps}, went on from {resumed}"
    out = Outcome(run_dir, seen, [first.code, second.code], first.num_steps - resumed)
    own, other = (
        {r["step"]: r["params_digest"] for r in metrics.read(d) if r["kind"] == "rl"}
        for d in (run_dir, bench.baseline)
    )
    expected = {step: params for step, params in other.items() if step > resumed}
    if (first.code, second.code) != (KILLED, 0) or own != expected:
        out.wrong.append(f"parameters differ from the undisturbed run's, or none: {tail(second)}")
    bound(out, bench, 2)
    return out


def store_gone(bench: Bench) -> Outcome:
    """As a bucket that is not mounted looks."""
    run_dir = bench.new_dir()
    bench.run(run_dir)
    first = (run_dir / metrics.METRICS).read_bytes()
    shutil.rmtree(run_dir / benches.CHECKPOINTS)
    second = bench.run(run_dir)
    out = Outcome(run_dir, "refused to begin anew", [second.code])
    if second.code != exits.DATA or (run_dir / metrics.METRICS).read_bytes() != first:
        out.wrong.append(f"exit code {second.code}: {tail(second)}")
    return out


def none_sound(bench: Bench) -> Outcome:
    run_dir = bench.new_dir()
    job = bench.start(run_dir)
    job.until(lambda: len(benches.checkpoints(run_dir)) >= 2)
    job.signal(signal.SIGKILL)
    first = job.end()
    for checkpoint in benches.checkpoints(run_dir):
        empty(checkpoint)
    second = bench.run(run_dir)
    out = Outcome(run_dir, "refused to begin anew", [first.code, second.code])
    if second.code != exits.DATA or second.num_steps < first.num_steps:
        out.wrong.append(f"exit code {second.code}, {second.num_steps} steps: {tail(second)}")
    return out


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[None]:
    if why := benches.mount(folder, "-t", "tmpfs", "-o", options, "tmpfs"):
        raise Skipped(f"mount: {why}")
    try:
        yield
    finally:
        benches.unmount(folder)


def disk_full(bench: Bench) -> Outcome:
    """Of a small disk, that the run directory is on, not a byte is left."""
    disk = bench.new_dir()
    disk.mkdir()
    with _mounted(disk, "size=200m"):
        run_dir, filler = disk / "run", disk / "filler"
        job = bench.start(run_dir)
        job.until(lambda: len(benches.checkpoints(run_dir)) >= 2)
        with open(filler, "wb", buffering=0) as file:
            for size in (2**20, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        first = job.end()
        filler.unlink()
        out = _goes_on(bench, first, run_dir, exits.IO, saves_lost=3)
        out.wrong += bench.left_over(run_dir)
    return out


def read_only(bench: Bench) -> Outcome:
    """In the place of the checkpoints there is a disk that takes nothing."""
    run_dir = bench.new_dir()
    job = bench.start(run_dir)
    job.until(lambda: len(benches.checkpoints(run_dir)) >= 2)
    with _mounted(run_dir / benches.CHECKPOINTS, "ro"):
        first = job.end()
    return _goes_on(bench, first, run_dir, exits.IO, saves_lost=4)


def directory_gone(bench: Bench) -> Outcome:
    """As when the disk that it is on is unmounted for a while."""
    run_dir = bench.new_dir()
    away = run_dir.with_name(f"{run_dir.name}_away")
    job = bench.start(run_dir)
    job.until(lambda: len(benches.checkpoints(run_dir)) >= 2)
    run_dir.rename(away)
    ended = job.end()
    shutil.rmtree(run_dir, ignore_errors=True)
    away.rename(run_dir)
    first = dataclasses.replace(ended, num_steps=job.num_steps)
    return _goes_on(bench, first, run_dir, exits.IO, saves_lost=4)


def _injected(name: str, *, same: bool = True) -> Callable[[Bench], Outcome]:
    def try_it(bench: Bench) -> Outcome:
        run_dir = bench.new_dir()
        return _stays(bench, bench.run(run_dir, inject=name), run_dir, same=same)

    return try_it


def _ends(
    name: str, code: int, *overrides: str, says: str = "", saves_lost: int = 1
) -> Callable[[Bench], Outcome]:
    def try_it(bench: Bench) -> Outcome:
        run_dir = bench.new_dir()
        first = bench.run(run_dir, *overrides, inject=name)
        out = _goes_on(bench, first, run_dir, code, saves_lost=saves_lost)
        if says not in first.text:
            out.wrong.append(f"does not say {says!r}: {tail(first)}")
        return out

    return try_it


def pause(bench: Bench) -> Outcome:
    """The step stays, with the update that it made."""
    run_dir = bench.new_dir()
    first = bench.run(run_dir, "gates.on_mismatch=pause", inject="mismatch")
    second = bench.run(run_dir, "gates.on_mismatch=pause")
    out = Outcome(run_dir, f"paused after step {first.num_steps}", [first.code, second.code])
    out.lost = first.num_steps - (second.resumed or 0)
    if (first.code, second.code) != (exits.GATE, 0) or out.lost:
        out.wrong.append(f"{tail(first)}; {tail(second)}")
    return out


def hung_graders(bench: Bench) -> Outcome:
    """Stopped for good; their answers time out, and they are replaced."""

    def act(job: benches.Job) -> None:
        for pid in job.workers(_GRADER):
            os.kill(pid, signal.SIGSTOP)

    ended, run_dir = _after_steps(bench, 2, act)
    return _stays(bench, ended, run_dir, same=False)


_SAME = "the metrics of the undisturbed run"
_BEFORE = f"the one before is taken; {_SAME}"
FAULTS = (
    Fault("kill -9 at random moments", f"-9 each; resumed: {_SAME}", kill),
    Fault("kill -9 while saving", f"-9; resumed: {_SAME}", kill_saver),
    Fault("kill -9 of all sandbox processes", f"0, {_SAME}", _to_workers(_SANDBOX, 9)),
    Fault("kill -9 of the verifiers", f"0, {_SAME}", _to_workers(_GRADER, 9)),
    Fault("hung sandbox processes", f"0, {_SAME}", _to_workers(_SANDBOX, signal.SIGSTOP)),
    Fault("hung verifiers", "0, in bounded time", hung_graders),
    Fault("slow tool", f"0, {_SAME}", _injected("slow_tool")),
    Fault("clock jumps", f"0, {_SAME}", _injected("clock_jumps")),
    Fault("SIGTERM", f"{exits.TERMINATED}, no step lost; resumed: {_SAME}", terminate),
    Fault(
        "Ctrl-C",
        f"{exits.INTERRUPTED}, no step lost; resumed: {_SAME}",
        _asked_by(signal.SIGINT, exits.INTERRUPTED),
    ),
    Fault(
        "lost connection (SIGHUP)",
        f"{exits.HUNG_UP}, no step lost; resumed: {_SAME}",
        _asked_by(signal.SIGHUP, exits.HUNG_UP),
    ),
    Fault("nobody reads its output", f"0, {_SAME}", _injected("no_reader")),
    Fault("truncated checkpoint", _BEFORE, _damaged(truncate)),
    Fault("flipped bit in a checkpoint", _BEFORE, _damaged(flip_bit)),
    Fault("empty checkpoint", _BEFORE, _damaged(empty)),
    Fault("checkpoint without an item", _BEFORE, _damaged(lose_item)),
    Fault("no sound checkpoint", f"{exits.DATA}, nothing is deleted", none_sound),
    Fault("run directory lost", "-9; same parameters from the store's checkpoints", directory_lost),
    Fault("checkpoints gone", f"{exits.DATA}, nothing is lost", store_gone),
    Fault("disk full", f"{exits.IO}; with space again: {_SAME}", disk_full),
    Fault("read-only disk", f"{exits.IO}; writable again: {_SAME}", read_only),
    Fault("run directory unmounted", f"{exits.IO}; there again: {_SAME}", directory_gone),
    Fault("store fails twice", f"0, {_SAME}", _injected("store_fails_twice")),
    Fault(
        "store fails", f"{exits.IO}; resumed: {_SAME}", _ends("store_fails", exits.IO, saves_lost=4)
    ),
    Fault("one step of NaN", "0, its updates are skipped", _injected("one_nan_step", same=False)),
    Fault(
        "NaN from a step on",
        f"{exits.GATE}; without: {_SAME}",
        _ends("nan_steps", exits.GATE, says="without an update", saves_lost=3),
    ),
    Fault(
        "mismatch, gate says stop",
        f"{exits.GATE}; without: {_SAME}",
        _ends("mismatch", exits.GATE, "gates.on_mismatch=stop", says="disagree"),
    ),
    Fault("mismatch, gate says pause", f"{exits.GATE}, the step is saved", pause),
    Fault(
        "stalled data reader",
        f"stacks of all threads, {exits.AGAIN}; resumed: {_SAME}",
        _ends(
            "stalled_reader",
            exits.AGAIN,
            "watchdog.min_s=2",
            "watchdog.limit_s=12",
            says="what all threads do",
        ),
    ),
)
