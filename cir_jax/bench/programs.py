"""Short programs such as models write, each with what it has to print: the load of a benchmark.

Imports nothing of the package, so that other executors can be measured on the same programs.
"""

import random

# Kind -> how many of a hundred programs.
_MIX = {"trivial": 35, "sympy": 30, "numpy": 10, "search": 22, "error": 3}

SOLVE = (
    "from sympy import symbols, solve\nx = symbols('x')\nprint(sorted(solve(x**2 - {s}*x + {p})))"
)
"""Roots of x² - s x + p."""


def mixed(num: int, seed: int) -> list[tuple[str, str]]:
    """(code, text of the result) of `num` programs in random order."""
    draw = random.Random(seed)
    kinds = [kind for kind, share in _MIX.items() for _ in range(share)]
    programs = [_program(kinds[i * 37 % 100], draw) for i in range(num)]
    draw.shuffle(programs)
    return programs


def _program(kind: str, draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(2, 50), draw.randrange(50, 99)
    if kind == "trivial":
        return f"print({a} + {b})", str(a + b)
    if kind == "sympy":
        return SOLVE.format(s=a + b, p=a * b), f"[{a}, {b}]"
    if kind == "numpy":
        code = f"import numpy as np\nprint(int(np.trace(np.diag([{a}, {b}, 1]) @ np.eye(3))))"
        return code, str(a + b + 1)
    if kind == "search":
        # 1e5 to 3e6 steps of an empty loop: 5 to 150 ms.
        steps = draw.randrange(100_000, 3_000_000)
        return f"n = 0\nfor n in range({steps}): pass\nprint(n)", str(steps - 1)
    return f"print(undefined_{a})", f"NameError: name 'undefined_{a}' is not defined"
