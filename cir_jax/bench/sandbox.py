"""`cir-jax bench sandbox`: programs per second, and how long one takes.

With `--against pebble` the same programs go through a process pool without isolation, in three
ways: as the reference code of CIR calls it (a new pool of 64 for each batch, nothing imported
before), the same with numpy and sympy imported before, and one warm pool of as many workers. That
pool has the trainer's packages, the sandbox and fresh interpreters those of programs. All give way
to other processes as the sandbox does, so that these slow each of them down alike.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from cir_jax.bench import programs
from cir_jax.config import ConfigError, ResultConfig
from cir_jax.sandbox import packages
from cir_jax.sandbox.isolation import NICENESS
from cir_jax.sandbox.pool import Sandbox
from cir_jax.sandbox.text import result_text

_FRESH_STARTS = 6
_ROUNDS = 3
_SEED = 0


def bench_sandbox(*, workers: int, num: int, against: str | None) -> None:
    """Prints one line of JSON for each load and system.

    Args:
      workers: programs at once.
      num: programs of each load.

    programs_per_s counts right answers only; p50_ms and p99_ms are of one program at a time, from
    submission to result.
    """
    solve = programs.SOLVE.format(s=5, p=6)
    interpreter = packages.find("").interpreter
    with Sandbox(num_workers=workers, interpreter=interpreter) as sandbox:
        sandbox.wait_until_ready()
        load = {"trivial": [("print(1 + 1)", "2")] * num, "solve": [(solve, "[2, 3]")] * num}
        load["mixed"] = programs.mixed(num, _SEED)
        lines = {name: _measure(sandbox, name, pairs) for name, pairs in load.items()}
        common = {"system": "cir_jax", "rung": sandbox.rung, "workers": workers}
        for line in lines.values():
            _say(common | line)
        fresh = _measure_fresh(interpreter, solve, workers)
        _say(fresh)
        ratio = lines["solve"]["programs_per_s"] / fresh["programs_per_s"]
        _say({"ratio": "cir_jax/fresh python", "load": "solve", "programs_per_s": ratio})
        if against:
            _compare(sandbox, workers, load["mixed"])


def _compare(sandbox: Sandbox, workers: int, pairs: list[tuple[str, str]]) -> None:
    """In turn, so that what else the machine does strikes all; medians of the ratios."""
    ratios: dict[str, list[float]] = {}
    for _ in range(_ROUNDS):
        ours = _measure(sandbox, "mixed", pairs)["programs_per_s"]
        for line in _measure_pebble(workers, pairs):
            _say(line)
            ratios.setdefault(line["system"], []).append(ours / line["programs_per_s"])
    for system, values in ratios.items():
        median = statistics.median(values)
        _say({"ratio": f"cir_jax/{system}", "load": "mixed", "programs_per_s": median})


def _say(line: dict[str, Any]) -> None:
    print(json.dumps({"bench": "sandbox"} | line), flush=True)


def _measure(sandbox: Sandbox, name: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    started = time.perf_counter()
    futures = [sandbox.submit(code) for code, _ in pairs]
    texts = [result_text(future.result(), ResultConfig()) for future in futures]
    wall_s = time.perf_counter() - started
    num_right = sum(text == want for text, (_, want) in zip(texts, pairs, strict=True))
    alone = sorted(_seconds(sandbox, code) for code, _ in pairs[: max(1, len(pairs) // 2)])
    return {
        "load": name,
        "num": len(pairs),
        "num_right": num_right,
        "programs_per_s": num_right / wall_s,
        "p50_ms": 1e3 * alone[len(alone) // 2],
        "p99_ms": 1e3 * alone[len(alone) * 99 // 100],
    }


def _seconds(sandbox: Sandbox, code: str) -> float:
    started = time.perf_counter()
    sandbox.submit(code).result()
    return time.perf_counter() - started


def _measure_fresh(interpreter: str, code: str, workers: int) -> dict[str, Any]:
    """Interpreters that are started for one program each, `workers` at once."""
    started = time.perf_counter()
    for _ in range(_FRESH_STARTS):
        command = ["nice", "-n", str(NICENESS), interpreter, "-c", code]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(workers)]
        for process in running:
            process.communicate()
    rate = _FRESH_STARTS * workers / (time.perf_counter() - started)
    return {"system": "fresh python", "workers": workers, "load": "solve", "programs_per_s": rate}


def _measure_pebble(workers: int, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    path = os.path.join(os.path.dirname(__file__), "sandbox_pebble.py")
    done = subprocess.run(
        ["nice", "-n", str(NICENESS), sys.executable, path, str(workers)],
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ConfigError(f"bench sandbox --against pebble: {done.stderr.strip()[-500:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]
