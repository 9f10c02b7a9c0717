"""What runs programs, as those see it that hand them in."""

from concurrent.futures import Future
from typing import Any, Protocol

from cir_jax.records import ExecResult
from cir_jax.sandbox.limits import Limits


class Submitter(Protocol):
    """Takes programs."""

    def submit(self, code: str, *, seed: int = 0) -> Future[ExecResult]:
        """Queues a program. `seed` is for its random numbers.

        Each future has one result, in any order; it raises RuntimeError if what runs programs has
        itself ended.
        """
        ...


class Executor(Submitter, Protocol):
    """A sandbox of this host's (pool.py), or a service elsewhere (remote.py)."""

    limits: Limits
    description: dict[str, Any]
    """What, besides limits, program and seed, may decide what programs print: JSON values."""

    def stats(self) -> dict[str, Any]: ...

    def close(self) -> None:
        """Ends all programs. May be called twice."""
        ...
