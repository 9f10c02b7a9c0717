"""The drill's job with a fault inside it: `python -m cir_jax.drill.job FAULT train CONFIG ...`.

Faults that no signal, mount or file can bring about from outside are put into the process before
it begins.
"""

import dataclasses
import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from cir_jax import cli, peers

# RL steps, from 0, from which on a fault is there.
AT_STEP = 3


def clock_jumps() -> None:
    """The wall clock goes an hour ahead, and two back, every other second."""
    began, now, now_ns = time.monotonic(), time.time, time.time_ns

    def shift_s() -> int:
        return (0, 3600, -3600)[int((time.monotonic() - began) / 2) % 3]

    time.time = lambda: now() + shift_s()
    time.time_ns = lambda: now_ns() + shift_s() * 10**9


def no_reader() -> None:
    """Whatever reads its output, such as `tee`, has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    for fd in (1, 2):
        os.dup2(writer, fd)


def slow_tool() -> None:
    """Each program's result comes half a second late."""
    from cir_jax.sandbox.pool import Sandbox

    submit = Sandbox.submit

    def late(self, code: str, *, seed: int = 0) -> Future:
        own: Future = Future()
        inner = submit(self, code, seed=seed)
        inner.add_done_callback(
            lambda done: threading.Timer(0.5, lambda: own.set_result(done.result())).start()
        )
        return own

    Sandbox.submit = late


def failing_store(times: int) -> None:
    """The first saves fail, as a store's do that is not there."""
    import orbax.checkpoint as ocp

    save, count = ocp.CheckpointManager.save, [0]

    def failing(self, step: int, *args, **options) -> bool:
        count[0] += 1
        if count[0] <= times:
            raise OSError(errno.EIO, "Input/output error", str(self.directory))
        return save(self, step, *args, **options)

    ocp.CheckpointManager.save = failing


def stalled_reader() -> None:
    """The problems of a step never come."""
    from cir_jax.data import pipeline

    original = pipeline.rl_problems

    def problems(cfg, found) -> Callable:
        inner = original(cfg, found)

        def of(number: int) -> list:
            if number == AT_STEP:
                time.sleep(10**6)
            return inner(number)

        return of

    pipeline.rl_problems = problems


def not_finite(num_steps: int) -> None:
    """The advantages of so many steps are not numbers, nor are loss and gradients then."""
    from cir_jax.train.learn import Learner

    learn, advantages = Learner.learn, Learner._advantages

    def of_step(self, models, groups, rewards_PG, step):
        self.drilled = AT_STEP <= step < AT_STEP + num_steps
        return learn(self, models, groups, rewards_PG, step)

    def spoiled(self, *args):
        rows, figures = advantages(self, *args)
        return ([x * np.nan for x in rows] if self.drilled else rows), figures

    Learner.learn, Learner._advantages = of_step, spoiled


def mismatch() -> None:
    """The sampler's log-probabilities of one step are not the trainer's."""
    from cir_jax.train import loop

    gather = loop.gather

    def spoiled(*args, step: int, **options):
        new = gather(*args, step=step, **options)
        if step == AT_STEP:
            groups = [
                [dataclasses.replace(t, logp=t.logp - np.float32(3)) for t in group]
                for group in new.groups
            ]
            new = dataclasses.replace(new, groups=groups)
        return new

    loop.gather = spoiled


def fails() -> None:
    """The grading of a step raises an exception."""
    from cir_jax.train import experience

    grade, count = experience.grade, [0]

    def failing(*args) -> list:
        count[0] += 1
        return grade(*args) if count[0] <= AT_STEP else 1 // 0

    experience.grade = failing


def of_process_1(fault: Callable[[], None]) -> Callable[[], None]:
    return lambda: fault() if os.environ.get(peers.INDEX) == "1" else None


FAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "clock_jumps": clock_jumps,
    "no_reader": no_reader,
    "slow_tool": slow_tool,
    "store_fails_twice": lambda: failing_store(2),
    "store_fails": lambda: failing_store(10**6),
    "stalled_reader": stalled_reader,
    "one_nan_step": lambda: not_finite(1),
    "nan_steps": lambda: not_finite(10**6),
    "mismatch": mismatch,
    "process_1_stalls": of_process_1(stalled_reader),
    "process_1_fails": of_process_1(fails),
}

if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
    sys.exit(cli.main())
