"""A process pool without isolation, measured on programs from stdin; run as a script.

Prints a line of JSON for each of three ways to use it. Programs are executed with `exec`, their
stdout collected, in processes forked from this one, at most 5 s each, in batches of 256 as the
reference code of CIR does it.
"""

import contextlib
import io
import json
import sys
import time

from pebble import ProcessPool

_BATCH, _TIMEOUT_S, _REFERENCE_WORKERS = 256, 5, 64


def execute(code: str) -> str:
    """The text of the result: what was printed, or the error's last line."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(code, {})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return out.getvalue().strip()


def run_batch(pool: ProcessPool, codes: list[str]) -> list[str]:
    texts = []
    results = pool.map(execute, codes, timeout=_TIMEOUT_S).result()
    for _ in codes:
        try:
            texts.append(next(results))
        except Exception as error:
            texts.append(type(error).__name__)
    return texts


def measure(name: str, pairs: list[tuple[str, str]], pool: ProcessPool | None) -> None:
    """Args: pool: the warm one; None: a new one for each batch."""
    num_right, started = 0, time.perf_counter()
    for start in range(0, len(pairs), _BATCH):
        batch = pairs[start : start + _BATCH]
        codes = [code for code, _ in batch]
        if pool is None:
            with ProcessPool(max_workers=_REFERENCE_WORKERS) as fresh:
                texts = run_batch(fresh, codes)
        else:
            texts = run_batch(pool, codes)
        num_right += sum(text == want for text, (_, want) in zip(texts, batch, strict=True))
    rate = num_right / (time.perf_counter() - started)
    line = {"system": name, "load": "mixed", "num": len(pairs), "num_right": num_right}
    print(json.dumps(line | {"programs_per_s": rate}), flush=True)


def main() -> None:
    pairs = json.load(sys.stdin)
    measure("pebble as called", pairs, None)
    import numpy  # noqa: F401
    import sympy  # noqa: F401

    measure("pebble preloaded", pairs, None)
    with ProcessPool(max_workers=int(sys.argv[1])) as pool:
        run_batch(pool, [code for code, _ in pairs[:50]])
        measure("pebble warm", pairs, pool)


if __name__ == "__main__":
    main()
