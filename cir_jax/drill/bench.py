"""The bench that faults are tried on: a job's process, its run directory, and what it leaves."""

import ctypes
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cir_jax import config as configs
from cir_jax import metrics, peers, prctl
from cir_jax.exits import RunError

_SET_CHILD_SUBREAPER = 36
# Of one start; later ones get ten times as long as the first took.
_FIRST_LIMIT_S, _LEAST_LIMIT_S = 1800.0, 120.0
_ORPHANS_GONE_S = 5.0
_RESUMED = re.compile(r"resuming after (\w+) step (\d+)")
CHECKPOINTS = "checkpoints"


def adopt_orphans() -> None:
    """Makes this process the parent of what its children leave behind, so that it is found."""
    prctl.prctl("PR_SET_CHILD_SUBREAPER", _SET_CHILD_SUBREAPER, 1)


@dataclasses.dataclass
class Ended:
    """How a start of the job ended. codes: exit code of each process, or minus the signal.
    num_steps: RL steps in the metrics then. resumed: RL step that it went on from; None if it began
    anew."""

    codes: list[int]
    text: str
    num_steps: int
    resumed: int | None
    seconds: float

    @property
    def code(self) -> int:
        """The first process's."""
        return self.codes[0]


class Job:
    """One start of the job, in a process of its own, or in several of one device each."""

    def __init__(
        self,
        run_dir: Path,
        inject: str,
        args: Sequence[str],
        scratch: Path,
        limit_s: float,
        num_processes: int,
    ):
        """args: of `cir-jax train`. limit_s: after which it is killed."""
        self._limit_s = limit_s
        self.run_dir = run_dir
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        temp = scratch / "temp"
        temp.mkdir(exist_ok=True)
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TMPDIR": str(temp),
        }
        argv = ["train", *args, f"run_dir={str(run_dir)!r}", "resume=true"]
        self._began = time.monotonic()
        address = f"127.0.0.1:{_free_port()}"
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "cir_jax.drill.job", inject, *argv],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=env | _place(address, num_processes, index),
                start_new_session=True,
            )
            for index in range(num_processes)
        ]

    @property
    def num_steps(self) -> int:
        return metrics.num_steps(self.run_dir)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Waits for it; False if the job ends before."""
        while not condition():
            if self._processes[0].poll() is not None:
                return False
            if time.monotonic() - self._began > self._limit_s:
                self.signal(signal.SIGKILL)
            time.sleep(0.005)
        return True

    def signal(self, signum: int, process: int | None = None) -> None:
        """To one of its processes, or to all."""
        for each in self._processes if process is None else [self._processes[process]]:
            if each.poll() is None:
                each.send_signal(signum)

    def workers(self, kind: str) -> list[int]:
        """Process ids of its descendants whose command line has this in it."""
        own = [pid for process in self._processes for pid in descendants(process.pid)]
        return [pid for pid in own if kind in _command(pid)]

    def end(self) -> Ended:
        """Waits for it."""
        deadline = time.monotonic() + self._limit_s
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        codes = [process.wait() for process in self._processes]
        seconds = time.monotonic() - self._began
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")
        self._log.close()
        found = _RESUMED.search(text)
        resumed = None if found is None else int(found[2]) * (found[1] != "sft")
        return Ended(codes, text, self.num_steps, resumed, seconds)


class Bench:
    """Makes a run that nothing happens to, the baseline.

    Args:
      scratch: for everything.
      config, overrides: of the job.
      num_kills: of one run, at random moments.

    Raises:
      RunError: the job fails by itself.
    """

    def __init__(
        self, scratch: Path, config: Path, overrides: Sequence[str] = (), *, num_kills: int = 3
    ):
        self.scratch, self.num_kills = scratch, num_kills
        self._args = [str(config), *overrides]
        self.every = configs.load(config, overrides).checkpoint.every
        self._limit_s = _FIRST_LIMIT_S
        self._count = 0
        self.baseline = scratch / "baseline"
        job = self.start(self.baseline)
        job.until(lambda: job.num_steps > 0)
        began = time.monotonic()
        ended = job.end()
        if ended.code != 0:
            raise RunError(f"the job itself ended with {ended.code}: {ended.text}", ended.code)
        self.num_steps = ended.num_steps
        self.step_s = (time.monotonic() - began) / self.num_steps
        self._limit_s = max(_LEAST_LIMIT_S, 10 * ended.seconds)

    def new_dir(self) -> Path:
        self._count += 1
        return self.scratch / f"run{self._count}"

    def start(
        self, run_dir: Path, *overrides: str, inject: str = "none", num_processes: int = 1
    ) -> Job:
        args = [*self._args, *overrides]
        return Job(run_dir, inject, args, self.scratch, self._limit_s, num_processes)

    def run(
        self, run_dir: Path, *overrides: str, inject: str = "none", num_processes: int = 1
    ) -> Ended:
        return self.start(run_dir, *overrides, inject=inject, num_processes=num_processes).end()

    def same_as_baseline(self, run_dir: Path, baseline: Path | None = None) -> str:
        """ "" if its metrics are, byte for byte, else what is not. baseline: another one."""
        baseline = baseline or self.baseline
        own, other = ((d / metrics.METRICS).read_bytes() for d in (run_dir, baseline))
        return "" if own == other else "metrics differ from the undisturbed run's"

    def left_over(self, run_dir: Path) -> list[str]:
        """Processes and temporary files of the jobs since the last call."""
        deadline = time.monotonic() + _ORPHANS_GONE_S
        while (orphans := _orphans()) and time.monotonic() < deadline:
            time.sleep(0.05)
        found = [f"process {pid} ({_command(pid)[:60]})" for pid in orphans]
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
        for path in (self.scratch / "temp").rglob("*"):
            if path.is_file():
                found.append(f"temporary file {path}")
                path.unlink()
        found += [f"file {p}" for p in run_dir.rglob("*") if "tmp" in p.name]
        return found


def _place(address: str, num_processes: int, index: int) -> dict[str, str]:
    """The environment that says which of several processes this is."""
    if num_processes == 1:
        return {}
    values = (address, str(num_processes), str(index))
    return dict(zip(peers.VARIABLES, values, strict=True))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def checkpoints(run_dir: Path) -> list[Path]:
    """Those that are listed, in the order of saving."""
    found = [p for p in (run_dir / CHECKPOINTS).glob("*") if p.name.isdigit()]
    return sorted(found, key=lambda p: int(p.name))


def place(checkpoint: Path) -> int:
    """RL step of a sound checkpoint."""
    return json.loads((checkpoint / "record/metadata").read_text())["place"]["step"]


def descendants(pid: int) -> Iterator[int]:
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue  # it has ended
        parent = int(text.rpartition(")")[2].split()[1])
        parents.setdefault(parent, []).append(int(path.parent.name))
    waiting = [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        yield from children
        waiting += children


def _orphans() -> list[int]:
    """Descendants that have not ended; those that have are let go of."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    return [pid for pid in descendants(os.getpid()) if not _has_ended(pid)]


def _has_ended(pid: int) -> bool:
    """Also of one that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _command(pid: int) -> str:
    """ "" of one that has ended, or is about to run another program."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def mount(folder: Path, *options: str) -> str:
    """ "" or why it was not possible."""
    try:
        subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=True)
    except OSError as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        return error.stderr.strip()
    return ""


_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2


def unmount(folder: Path) -> None:
    _libc.umount2(str(folder).encode(), _MNT_DETACH)
