"""Runs of several processes on this machine, each with virtual devices, as on a slice's hosts."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from models_table import ONE_DEVICE_FLAGS

ROOT = Path(__file__).parent.parent
CLI = ("-m", "cir_jax.cli")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclasses.dataclass
class Pod:
    """Processes, and the files with what each says."""

    processes: list[subprocess.Popen]
    said: list[Path]

    def wait(self, timeout_s: float = 300) -> list[int]:
        """Exit codes; those that are not there in time are killed."""
        deadline = time.monotonic() + timeout_s
        try:
            return [p.wait(max(0.0, deadline - time.monotonic())) for p in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def text(self, index: int) -> str:
        return self.said[index].read_text()

    def check(self, timeout_s: float = 300) -> None:
        codes = self.wait(timeout_s)
        texts = "\n".join(f"--- {i}:\n{self.text(i)[-4000:]}" for i in range(len(codes)))
        assert codes == [0] * len(codes), texts


def start(folder: Path, count: int, devices: int, *args: str, each=lambda index: ()) -> Pod:
    """`python args...` as processes of one run. each: more arguments of a process."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ONE_DEVICE_FLAGS.replace("device_count=1", f"device_count={devices}")
    address = f"127.0.0.1:{free_port()}"
    processes, said = [], []
    for index in range(count):
        environment = os.environ | {"XLA_FLAGS": flags}
        if count > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
        said.append(folder / f"said.{index}")
        with open(said[-1], "w") as out:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *args, *each(index)],
                    cwd=ROOT,
                    env=environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    return Pod(processes, said)
