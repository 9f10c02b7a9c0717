"""Short programs such as models write, each with what it has to print: the load of a benchmark.

Imports nothing of the package, so that other executors can be measured on the same programs.
"""

import random
from fractions import Fraction

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
        return _symbolic(draw, a, b)
    if kind == "numpy":
        code = f"import numpy as np\nprint(int(np.trace(np.diag([{a}, {b}, 1]) @ np.eye(3))))"
        return code, str(a + b + 1)
    if kind == "search":
        # 1e5 to 3e6 steps of an empty loop: 5 to 150 ms.
        steps = draw.randrange(100_000, 3_000_000)
        return f"n = 0\nfor n in range({steps}): pass\nprint(n)", str(steps - 1)
    return f"print(undefined_{a})", f"NameError: name 'undefined_{a}' is not defined"


def _symbolic(draw: random.Random, a: int, b: int) -> tuple[str, str]:
    """One of the tasks that school books have."""
    system = f"x, y = symbols('x y')\nprint(solve([x + y - {a + b}, x - y - {a - b}], [x, y]))"
    tasks = (
        (SOLVE.format(s=a + b, p=a * b), f"[{a}, {b}]"),
        (system, f"{{x: {a}, y: {b}}}"),
        (f"print(solve(Eq(sqrt(x + {a}), {b}), x))", f"[{b * b - a}]"),
        (f"print(expand((x - {a}) * (x - {b})))", f"x**2 - {a + b}*x + {a * b}"),
        (f"print(len(factor(x**2 - {a + b}*x + {a * b}).args))", "2"),
        (f"print(simplify({a}*sin(x)**2 + {a}*cos(x)**2 + {b}))", f"{a + b}"),
        (f"print(diff({a}*x**3 + sin({b}*x), x).subs(x, 0))", f"{b}"),
        (f"print(integrate({3 * a}*x**2, (x, 0, {b})))", f"{a * b**3}"),
        (f"print(limit(sin({a}*x) / ({b}*x), x, 0))", f"{Fraction(a, b)}"),
        (f"print(summation(x, (x, {a}, {b})))", f"{sum(range(a, b + 1))}"),
        (f"print(Matrix([[{a}, 1], [1, {b}]]).det())", f"{a * b - 1}"),
        (f"print(Rational(1, {a}) + Rational(1, {b}))", f"{Fraction(1, a) + Fraction(1, b)}"),
    )
    code, text = draw.choice(tasks)
    if code.startswith("from sympy"):
        return code, text
    return f"from sympy import *\nx = symbols('x')\n{code}", text
