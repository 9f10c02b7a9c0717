"""Contenders of a benchmark: each a process of its own, measured in turn.

Machines are noisy, so what is compared is measured alternately within one run: round by round
one measurement of each. A process of its own tells each contender's peak of memory.
"""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Figures = dict[str, float]

# Run by a contender's interpreter. Its own packages come first, this one is found at the end: it
# need not be installed there, nor what it depends on.
_RUN = """
import runpy, sys
sys.path.append({root!r})
runpy.run_module({module!r}, run_name="__main__")
"""
_ROOT = str(Path(__file__).parents[2])


def serve(start: Callable[..., Callable[[], Figures]]) -> None:
    """A contender's main program: `start` gets the arguments and returns what measures once.

    Measures for every line on stdin and answers with one line of JSON, to which it adds the
    process's peak of resident memory so far, bytes.
    """
    measure = start(**json.loads(sys.argv[1]))
    for _ in sys.stdin:
        figures = measure()
        print(json.dumps(figures | {"peak_bytes": peak_bytes()}), flush=True)


def peak_bytes() -> int:
    """This process's peak of resident memory; getrusage's may be its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


class Contender:
    """A module that calls `serve`, running with arguments of its own.

    python: the interpreter. One that lacks this package must get by with the contender's imports.
    """

    def __init__(self, module: str, arguments: Mapping[str, Any], python: str = sys.executable):
        self.module = module
        code = _RUN.format(root=_ROOT, module=module)
        self._process = subprocess.Popen(
            [python, "-c", code, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self) -> Figures:
        """Raises RuntimeError if the process has ended."""
        try:
            print(file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # told below
        # Libraries may print as well; answers are the lines that are objects.
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.module} ended with exit code {self._process.wait()}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def contest(
    arguments: Mapping[str, Mapping[str, Any]],
    rounds: int,
    pythons: Mapping[str, str] | None = None,
) -> dict[str, Figures]:
    """The median of each figure over the rounds, of each module; of peak_bytes the last.

    arguments: of each module. The round before the first warms up and is not counted.
    pythons: interpreters of modules that do not run in this one.
    """
    pythons = dict.fromkeys(arguments, sys.executable) | dict(pythons or {})
    contenders = [Contender(module, given, pythons[module]) for module, given in arguments.items()]
    try:
        # The warm-up one after the other: set-up and compilation would disturb each other.
        measured: list[list[Figures]] = [
            [contender.measure() for contender in contenders] for _ in range(rounds + 1)
        ]
    finally:
        for contender in contenders:
            contender.close()
    by_module = zip(arguments, zip(*measured[1:], strict=True), strict=True)
    return {
        module: {name: statistics.median(f[name] for f in figures) for name in figures[0]}
        | {"peak_bytes": figures[-1]["peak_bytes"]}
        for module, figures in by_module
    }
