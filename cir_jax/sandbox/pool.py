"""The sandbox as the trainer sees it: programs in, ExecResults out, in any order.

What holds in every mode (see isolation.py): a program gets a fresh process, working directory and
module namespace; limits on time, memory, processes, files and output; no descriptor of the
trainer's; an environment without the trainer's variables. Its processes and files are gone before
its result comes back. It cannot end or block the trainer by crashing, hanging or flooding, and
cannot forge its status.

What is NOT covered:

- in every mode: reading what any user of the machine may read (world-readable files, the trainer's
  code and data sets); load on the processor by the allowed number of processes; system calls are
  not filtered, so a fault of the kernel may be used; sockets of other kinds than IP (vsock);
- without namespaces (root without CAP_SYS_ADMIN, or not root): the network; writing where any
  user may, such as /tmp; the total size and number of files;
- not as root: programs run as the trainer's user. They can read and write its files, and signal or
  trace its processes, the trainer and the worker (hence their own status) included; num_processes
  is only a rough bound; processes that a running program has started outlive a kill of its worker.
  Do not run untrusted code so.

`Sandbox.stats()` names the mode of each worker.
"""

import dataclasses
import json
import math
import os
import sys
from concurrent.futures import Future
from typing import Any, get_args

from cir_jax.records import ExecResult, ExecStatus
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.text import ERROR_TEXTS
from cir_jax.workers import FailureReason, WorkerPool

# All that a program's environment holds, besides HOME and TMPDIR. A fixed hash seed makes the
# order of sets the same in all workers; threads of the linear algebra would break the limits.
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class Sandbox:
    """Runs programs in `num_workers` worker processes.

    Args:
      limits: of each program.
      num_workers: programs at once; by default one for each core this process may use. More than
        the cores set aside makes programs run out of time that would not have alone.
      interpreter: the python of the programs; it needs numpy and sympy.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        num_workers: int | None = None,
        *,
        interpreter: str = sys.executable,
    ):
        self.limits = limits or Limits()
        self._pool = WorkerPool(
            "cir_jax.sandbox.worker",
            [json.dumps(dataclasses.asdict(self.limits))],
            num_workers=num_workers or len(os.sched_getaffinity(0)),
            timeout_s=self.limits.timeout_s,
            grace_s=self.limits.grace_s,
            decode=self._decode,
            failure=_failure,
            retry_timeouts=True,
            env=_ENVIRONMENT,
            interpreter=interpreter,
        )

    def submit(self, code: str, *, seed: int = 0) -> Future[ExecResult]:
        """Queues a program. `seed` is for its `random` and numpy.

        The future raises RuntimeError if no worker can be started.
        """
        return self._pool.submit({"code": code, "seed": seed})

    def stats(self) -> dict[str, Any]:
        """Counts of jobs, retries, restarts, recycled workers and host-side timeouts; "workers":
        mode and start-up time of each ready worker; "pids"."""
        return self._pool.stats()

    def close(self) -> None:
        """Ends all workers and programs. May be called twice."""
        self._pool.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _decode(self, job: dict, reply: dict) -> ExecResult:
        status, stdout, error, wall_s = (reply[k] for k in ("status", "stdout", "error", "wall_s"))
        if status not in get_args(ExecStatus):
            raise ValueError(f"status {status!r}")
        # 64: the note on what was cut. Decoding never makes more characters than bytes.
        if not isinstance(stdout, str) or len(stdout) > self.limits.output_bytes + 64:
            raise ValueError("stdout is no text, or too long")
        if not isinstance(error, str) or len(error) > self.limits.output_bytes + 64:
            raise ValueError("error is no text, or too long")
        if not isinstance(wall_s, float) or not (math.isfinite(wall_s) and wall_s >= 0):
            raise ValueError(f"wall_s {wall_s!r}")
        return ExecResult(status, stdout, ERROR_TEXTS.get(status, error), wall_s)


def _failure(job: dict, reason: FailureReason) -> ExecResult:
    """Two workers were lost with this program: that is the program's doing."""
    status = "timeout" if reason == "timeout" else "crashed"
    return ExecResult(status, error=ERROR_TEXTS[status])
