"""Programs as models write them, each compared with what plain python makes of it.

By kind; a line of three dashes parts two programs. Each prints something or fails, and only those
of the last kind fail. None rests on what differs: text and bytes written to stdout in turn without
a flush stand in their order here, as at a terminal, and in plain python's file they do not.
"""
# ruff: noqa: E501 - as long as they were written

import importlib.util
import re

_TABLE = {
    "arithmetic": r"""
print(2**100, -7 // 2, -7 % 3, divmod(-17, 5), pow(3, -1, 11), round(2.5), round(-0.5), 7 / 2)
---
print(0.1 + 0.2, 1e16 + 1, 1 / 3, float("inf"), -float("inf"), float("nan"), 1e-310, 5e-324)
---
import math
print(math.factorial(60), math.comb(50, 25), math.perm(10, 4), math.isqrt(10**41), math.gcd(0, 18))
---
import math
print(math.sqrt(2), math.exp(1), math.log(10), math.sin(1), math.atan2(-1, -1), math.hypot(3, 4))
---
import math
print(math.fsum([0.1] * 10), sum([0.1] * 10), math.prod(range(1, 20)), math.lcm(4, 6, 10))
---
import cmath
z = complex(3, -4)
print(abs(z), z.conjugate(), z**2, cmath.phase(z), cmath.sqrt(-1), cmath.exp(1j * cmath.pi))
---
n = 3**400
print(n, len(str(n)), sum(map(int, str(n))), n.bit_length(), n % 1000007)
---
for b in (2, 8, 16):
    print(f"{255:b}", f"{255:o}", f"{255:#x}", int("1010", b), (1234).to_bytes(4, "big"))
---
from fractions import Fraction
x = Fraction(3, 4) + Fraction("0.125")
print(x, repr(x), x.limit_denominator(3), Fraction(0.1), Fraction.from_float(0.5), float(x))
---
from fractions import Fraction
def cf(x, n):
    out = []
    for _ in range(n):
        out.append(x.numerator // x.denominator)
        if x == out[-1]:
            break
        x = 1 / (x - out[-1])
    return out
print(cf(Fraction(415, 93), 10), sum(Fraction(1, k) for k in range(1, 30)))
---
from decimal import Decimal, getcontext, ROUND_HALF_UP
getcontext().prec = 50
print(Decimal(2).sqrt(), Decimal(1) / 7, Decimal("2.675").quantize(Decimal("0.01"), ROUND_HALF_UP))
---
from decimal import Decimal, localcontext, InvalidOperation
with localcontext() as ctx:
    ctx.prec = 6
    print(Decimal(355) / 113, ctx.flags[InvalidOperation])
print(Decimal("1E+5").normalize(), Decimal("NaN"), Decimal(10).ln())
---
import operator
from functools import reduce
print(reduce(operator.xor, range(100)), ~5, 5 << 3, -9 >> 1, 0b1011 & 0b0110, (37).bit_count())
---
total = 0.0
for k in range(100000):
    total += (-1) ** k / (2 * k + 1)
print(4 * total, f"{4 * total:.10f}", f"{4 * total:e}", "%.3g" % total)
---
import sys
print(sys.float_info.epsilon, sys.maxsize, sys.int_info.default_max_str_digits, (0.1).hex())
""",
    "number theory": r"""
def sieve(n):
    flags = bytearray([1]) * (n + 1)
    flags[:2] = b"\0\0"
    for p in range(2, int(n**0.5) + 1):
        if flags[p]:
            flags[p * p :: p] = bytes(len(flags[p * p :: p]))
    return [i for i, f in enumerate(flags) if f]
primes = sieve(10000)
print(len(primes), primes[-5:], sum(primes))
---
def egcd(a, b):
    if b == 0:
        return a, 1, 0
    g, x, y = egcd(b, a % b)
    return g, y, x - a // b * y
print(egcd(240, 46), pow(17, -1, 3120), [pow(7, k, 13) for k in range(13)])
---
def crt(rs, ms):
    x, m = 0, 1
    for r, n in zip(rs, ms):
        while x % n != r:
            x += m
        m *= n
    return x, m
print(crt([2, 3, 2], [3, 5, 7]))
---
def miller(n):
    if n < 4:
        return n > 1
    d, s = n - 1, 0
    while d % 2 == 0:
        d, s = d // 2, s + 1
    for a in (2, 3, 5, 7, 11, 13, 17, 19, 23):
        if a % n == 0:
            continue
        x = pow(a, d, n)
        if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(s - 1)):
            return False
    return True
print([n for n in range(10**9, 10**9 + 100) if miller(n)], miller(2**61 - 1), miller(2**67 - 1))
---
best = max(range(1, 3000), key=lambda n: (lambda f: f(f, n))(lambda f, k: 1 if k == 1 else
    1 + f(f, k // 2 if k % 2 == 0 else 3 * k + 1)))
print(best)
---
def factor(n):
    out, p = {}, 2
    while p * p <= n:
        while n % p == 0:
            out[p] = out.get(p, 0) + 1
            n //= p
        p += 1
    return out | ({n: 1} if n > 1 else {})
for n in (360, 1001, 999999, 2**31 - 1):
    print(n, "=", " * ".join(f"{p}^{e}" for p, e in factor(n).items()))
---
perfect = [n for n in range(2, 900) if sum(d for d in range(1, n // 2 + 1) if n % d == 0) == n]
print(*perfect, sep=", ")
---
import sympy
print(sympy.factorint(10**12 + 39), sympy.totient(1000), sympy.divisor_sigma(360), sympy.mobius(30))
---
from sympy.ntheory.modular import crt
from sympy import n_order, primitive_root, discrete_log, nextprime, prevprime, primepi
print(crt([5, 7, 11], [1, 2, 3]), n_order(2, 101), primitive_root(23), discrete_log(41, 15, 7))
print(nextprime(10**10), prevprime(10**6), primepi(1000))
---
from sympy.ntheory import legendre_symbol, sqrt_mod
from sympy.ntheory.primetest import is_square
print([legendre_symbol(a, 11) for a in range(1, 11)], sqrt_mod(10, 13, True), is_square(10**20))
---
from sympy import diophantine, symbols, continued_fraction_periodic, egyptian_fraction, Rational
x, y = symbols("x y", integer=True)
print(sorted(diophantine(3*x + 5*y - 1), key=str), continued_fraction_periodic(0, 1, 7))
print(egyptian_fraction(Rational(7, 9)))
---
from math import isqrt
triples = [(a, b, isqrt(a*a + b*b)) for a in range(1, 60) for b in range(a, 60)
           if isqrt(a*a + b*b) ** 2 == a*a + b*b]
print(len(triples), triples[:8])
""",
    "combinatorics": r"""
from itertools import permutations, combinations, combinations_with_replacement, product
print(len(list(permutations(range(6)))), list(combinations("abcd", 2))[:4])
print(sum(1 for d in product(range(1, 7), repeat=4) if sum(d) == 14))
print(list(combinations_with_replacement("xy", 3)))
---
from functools import lru_cache
@lru_cache(maxsize=None)
def partitions(n, m):
    if n == 0:
        return 1
    return sum(partitions(n - k, k) for k in range(1, min(n, m) + 1))
print([partitions(n, n) for n in range(1, 26)], partitions.cache_info())
---
def catalan(n):
    c = [1] + [0] * n
    for i in range(1, n + 1):
        c[i] = sum(c[j] * c[i - 1 - j] for j in range(i))
    return c
print(catalan(20))
---
def queens(n, row=0, cols=0, d1=0, d2=0):
    if row == n:
        return 1
    count, free = 0, ~(cols | d1 | d2) & ((1 << n) - 1)
    while free:
        bit = free & -free
        free ^= bit
        count += queens(n, row + 1, cols | bit, (d1 | bit) << 1, (d2 | bit) >> 1)
    return count
print([queens(n) for n in range(1, 9)])
---
from itertools import accumulate, groupby, chain, islice, count, cycle, takewhile, zip_longest
print(list(accumulate([1, 2, 3, 4], lambda a, b: a * b)), list(islice(cycle("ab"), 5)))
print([(k, len(list(g))) for k, g in groupby("aaabbc")], list(takewhile(lambda x: x < 9, count(5))))
print(list(zip_longest([1, 2], "abc", fillvalue=None)), list(chain.from_iterable([[1], [2, 3]])))
---
from itertools import pairwise, starmap, compress, filterfalse, tee
a, b = tee(range(5))
print(list(pairwise(a)), list(starmap(pow, [(2, 5), (3, 2)])), list(compress("abcd", [1, 0, 1, 1])))
print(list(filterfalse(lambda x: x % 2, b)))
---
from math import factorial
derangements = [1, 0]
for n in range(2, 15):
    derangements.append((n - 1) * (derangements[-1] + derangements[-2]))
print(derangements, derangements[14] / factorial(14))
---
def stirling2(n, k, memo={}):
    if (n, k) not in memo:
        memo[n, k] = int(n == k) if n == 0 or k == 0 else k * stirling2(n-1, k) + stirling2(n-1, k-1)
    return memo[n, k]
print([[stirling2(n, k) for k in range(n + 1)] for n in range(7)])
---
from sympy.functions.combinatorial.numbers import bell, bernoulli, catalan, fibonacci, harmonic
print([bell(i) for i in range(8)], [bernoulli(i) for i in range(0, 12, 2)], catalan(10))
print(fibonacci(100), harmonic(10))
---
from sympy.combinatorics import Permutation, PermutationGroup
from sympy.combinatorics.named_groups import SymmetricGroup, AlternatingGroup
p = Permutation([2, 0, 1, 4, 3])
print(p.cyclic_form, p.order(), p.parity(), SymmetricGroup(4).order(), AlternatingGroup(4).is_abelian)
print(PermutationGroup([p]).order())
---
grid = [[1] * 8 for _ in range(8)]
for i in range(1, 8):
    for j in range(1, 8):
        grid[i][j] = grid[i - 1][j] + grid[i][j - 1]
for row in grid[:4]:
    print(" ".join(f"{v:4d}" for v in row))
---
words = ["listen", "silent", "enlist", "google", "elbow", "below", "inlets"]
groups = {}
for w in words:
    groups.setdefault("".join(sorted(w)), []).append(w)
print([g for g in groups.values() if len(g) > 1])
""",
    "algebra": r"""
from sympy import *
x = symbols("x")
print(solve(x**3 - 6*x**2 + 11*x - 6, x), solve(x**2 + x + 1, x), factor(x**8 - 1))
---
from sympy import *
x, y, z = symbols("x y z")
print(solve([x + y + z - 6, x*y + y*z + z*x - 11, x*y*z - 6], [x, y, z]))
---
from sympy import symbols, expand, collect, together, cancel, apart, simplify
a, b, c = symbols("a b c")
print(expand((a + b - c)**3), collect(a*b + a*c + b, a), together(1/a + 1/b))
print(cancel((a**2 - b**2)/(a - b)), apart(1/(a*(a + 1)*(a + 2)), a), simplify(a/(a*b)))
---
from sympy import Eq, symbols, solveset, S, Interval, sqrt, Abs
x = symbols("x", real=True)
print(solveset(Eq(sqrt(x + 3), x - 3), x, S.Reals), solveset(Abs(x - 2) < 5, x, S.Reals))
print(solveset(x**2 > 4, x, S.Reals), Interval(0, 5).intersect(Interval.open(3, 8)))
---
from sympy import Matrix, symbols
k = symbols("k")
M = Matrix([[1, k, 0], [0, 2, k], [k, 0, 3]])
print(M.det(), M.T, M.charpoly().as_expr(), M.subs(k, 0).inv())
---
from sympy import Matrix, pprint
A = Matrix([[4, 1], [2, 3]])
print(A.eigenvals(), A.eigenvects(), A.diagonalize(), A.rref(), A.rank(), A.nullspace())
pprint(A**3)
---
from sympy import Poly, symbols, gcd, lcm, resultant, discriminant, quo, rem, roots
x = symbols("x")
p, q = Poly(x**4 - 1), Poly(x**3 + x**2 + x + 1)
print(gcd(p, q), lcm(p, q), resultant(x**2 - 2, x**2 - 3, x), discriminant(x**3 + x + 1, x))
print(quo(p, q), rem(p, q), roots(x**4 - 5*x**2 + 4))
---
from sympy import groebner, symbols, nonlinsolve, linsolve
x, y = symbols("x y")
print(groebner([x**2 + y**2 - 5, x*y - 2], x, y).exprs, nonlinsolve([x*y - 1, x - 2], [x, y]))
print(linsolve([2*x + y - 1, x - y - 5], (x, y)))
---
from sympy import symbols, Piecewise, lambdify, Max, Heaviside, Rational
x = symbols("x")
f = Piecewise((x**2, x < 0), (x, True))
print(f, [f.subs(x, v) for v in (-2, 3)], lambdify(x, f)(4), Max(x, 2).subs(x, 1), Rational(3, 6))
---
from sympy import sqrt, nsimplify, radsimp, sqrtdenest, powsimp, symbols, root, cbrt
x = symbols("x", positive=True)
print(sqrtdenest(sqrt(5 + 2*sqrt(6))), radsimp(1/(sqrt(2) + 1)), nsimplify(4.242640687119286))
print(powsimp(x**2 * x**3), root(32, 5), cbrt(-8), sqrt(x**2))
---
from sympy import rsolve, Function, symbols
n = symbols("n", integer=True)
f = Function("f")
print(rsolve(f(n + 2) - f(n + 1) - f(n), f(n), {f(0): 0, f(1): 1}))
---
from sympy.logic import simplify_logic, satisfiable
from sympy import symbols, And, Or, Not, Implies, to_cnf
p, q, r = symbols("p q r")
print(simplify_logic((p & q) | (p & ~q)), to_cnf(Implies(p, q & r)), satisfiable(p & ~p))
---
from sympy import symbols, latex, sqrt, Integral, Matrix, Sum, oo, srepr, sin
x, n = symbols("x n")
print(latex(Integral(sqrt(x)/(x + 1), (x, 0, oo))), latex(Matrix([[1, x], [x**2, 0]])))
print(latex(Sum(1/n**2, (n, 1, oo))), srepr(sin(x) + 1))
---
from sympy import symbols, sympify, parse_expr, Symbol
from sympy.parsing.sympy_parser import standard_transformations, implicit_multiplication
e = parse_expr("2x + 3y**2", transformations=standard_transformations + (implicit_multiplication,))
print(e, e.free_symbols, e.subs({"x": 1, "y": 2}), sympify("sin(pi/6)"), e.has(Symbol("x")))
---
from sympy import symbols, Symbol, solve, Eq
speed, time = symbols("speed time", positive=True)
answer = solve([Eq(speed * time, 120), Eq((speed + 10) * (time - 1), 120)], [speed, time])
print(answer, [tuple(v.evalf(5) for v in s) for s in answer])
""",
    "analysis": r"""
from sympy import symbols
x, y, n = symbols("x y n")
print({x, y, n, x*y, x + y}, (x + y + n)**3, y*x + x**2 + 1)
---
from sympy import *
x = symbols("x")
print(diff(sin(x)*exp(x**2), x), diff(x**x, x, 2), integrate(log(x), x), integrate(1/(1 + x**2), x))
---
from sympy import *
x = symbols("x")
print(integrate(exp(-x**2), (x, -oo, oo)), integrate(sin(x)/x, (x, 0, oo)), integrate(x**2, (x, 0, 3)))
---
from sympy import *
x, a = symbols("x a")
print(limit((1 + a/x)**x, x, oo), limit((cos(x) - 1)/x**2, x, 0), limit(1/x, x, 0, "-"))
---
from sympy import *
x = symbols("x")
print(series(exp(sin(x)), x, 0, 6), series(log(1 + x), x, 0, 5).removeO(), series(1/x/(1 - x), x, 0, 3))
---
from sympy import *
x = symbols("x")
y = Function("y")
print(dsolve(y(x).diff(x, 2) + 4*y(x), y(x)), dsolve(y(x).diff(x) - x*y(x), y(x), ics={y(0): 2}))
---
from sympy import *
n, k = symbols("n k", integer=True, positive=True)
print(summation(k**3, (k, 1, n)).factor(), summation(1/(k*(k + 1)), (k, 1, oo)), product(k, (k, 1, 6)))
---
from sympy import *
x, y = symbols("x y")
f = x**3 - 3*x*y + y**3
points = solve([f.diff(x), f.diff(y)], [x, y], dict=True)
H = hessian(f, (x, y))
for p in sorted(points, key=str):
    print(p, H.subs(p).det())
---
from sympy import *
t, s = symbols("t s", positive=True)
print(laplace_transform(t**2*exp(-t), t, s, noconds=True), fourier_series(t, (t, -pi, pi)).truncate(3))
---
from sympy import N, pi, E, GoldenRatio, EulerGamma, zeta, gamma, Rational, nsolve, symbols, cos
x = symbols("x")
print(N(pi, 60), E.evalf(30), GoldenRatio.evalf(), EulerGamma.evalf(20), zeta(2), gamma(Rational(1, 2)))
print(nsolve(cos(x) - x, x, 1, prec=30))
---
from mpmath import mp, mpf, quad, zeta, findroot, sin, pi, nsum, inf, identify
mp.dps = 40
print(pi, quad(lambda t: mp.exp(-t * t), [-inf, inf]), zeta(3), findroot(sin, 3))
print(nsum(lambda n: 1 / n**2, [1, inf]), mpf(1) / 3)
---
from mpmath import mp, matrix, lu_solve, polyroots, taylor, exp, binomial, fac, mpc, workdps
with workdps(20):
    print(lu_solve(matrix([[2, 1], [1, 3]]), matrix([3, 5])), polyroots([1, 0, -2]))
print(taylor(exp, 0, 3), binomial(10, 3), fac(20), mpc(1, 2) ** 2, mp.dps)
---
def newton(f, df, x, tol=1e-12):
    for i in range(50):
        step = f(x) / df(x)
        x -= step
        if abs(step) < tol:
            return x, i
print(newton(lambda x: x**3 - 2, lambda x: 3 * x**2, 1.0))
---
def simpson(f, a, b, n=1000):
    h = (b - a) / n
    return h / 3 * (f(a) + f(b) + sum((4 if i % 2 else 2) * f(a + i * h) for i in range(1, n)))
from math import sin, pi, exp
print(simpson(sin, 0, pi), simpson(lambda x: exp(-x * x), -5, 5))
---
def rk4(f, y, t, h, steps):
    for _ in range(steps):
        k1 = f(t, y); k2 = f(t + h/2, y + h*k1/2); k3 = f(t + h/2, y + h*k2/2); k4 = f(t + h, y + h*k3)
        y += h * (k1 + 2*k2 + 2*k3 + k4) / 6
        t += h
    return y
print(rk4(lambda t, y: y - t**2 + 1, 0.5, 0, 0.2, 10))
---
lo, hi = 1.0, 2.0
while hi - lo > 1e-12:
    mid = (lo + hi) / 2
    lo, hi = (mid, hi) if mid**2 < 2 else (lo, mid)
print(lo, f"{lo:.9f}", lo.as_integer_ratio())
""",
    "numpy": r"""
import numpy as np
A = np.array([[2, 1, -1], [-3, -1, 2], [-2, 1, 2]], float)
print(np.linalg.solve(A, [8, -11, -3]), np.linalg.det(A), np.linalg.inv(A), A.T @ A, sep="\n")
---
import numpy as np
w, v = np.linalg.eigh(np.array([[2., 0], [0, 3]]))
print(w, v, np.linalg.norm([3, 4]), np.linalg.matrix_rank(np.ones((3, 3))), np.trace(np.eye(4)))
---
import numpy as np
x = np.linspace(0, 1, 11)
print(x, x.mean(), x.std(), np.cumsum(x), np.diff(x).round(3), np.percentile(x, [25, 50, 75]))
---
import numpy as np
a = np.arange(24).reshape(2, 3, 4)
print(a[:, 1, ::2], a.sum(axis=(0, 2)), a.T.shape, a[a % 5 == 0], np.where(a > 20), a.argmax(axis=1))
---
import numpy as np
rng = np.random.default_rng(42)
print(rng.integers(0, 10, 5), rng.normal(size=3), rng.permutation(6), rng.choice(["a", "b"], 4))
---
import numpy as np
np.random.seed(0)
print(np.random.rand(2, 2), np.random.randint(10, size=5), np.random.randn(2))
x = np.arange(5); np.random.shuffle(x); print(x)
---
import numpy as np
print(np.roots([1, -6, 11, -6]).round(9), np.polyfit([0, 1, 2], [1, 3, 7], 2).round(9))
print(np.poly1d([1, 2, 3])(2), np.poly1d([1, 2, 3]), np.convolve([1, 2], [1, 3]))
---
import numpy as np
print(np.float32(0.1), np.float64(0.1) + np.float32(0.2), np.int8(100) + np.int8(27), repr(np.pi))
print(np.array([1, 2.5]), np.array([1, "a"]), np.array([True, False]), np.array([1 + 2j]))
---
import numpy as np
np.set_printoptions(precision=3, suppress=True, linewidth=60)
print(np.random.default_rng(1).random((4, 8)), np.array([1e-10, 1e10]), np.arange(2000))
---
import numpy as np
with np.errstate(all="ignore"):
    print(np.array([1, -1, 0]) / 0, np.log(np.array([0.0, -1.0])), np.nanmean([1, np.nan, 3]))
print(np.isclose(0.1 + 0.2, 0.3), np.allclose([1, 2], [1, 2 + 1e-9]), np.isnan(np.nan))
---
import numpy as np
print(np.unique([3, 1, 2, 3], return_counts=True), np.bincount([0, 1, 1, 5]), np.histogram([1, 2, 2, 9], 4))
print(np.union1d([1, 2], [2, 3]), np.argsort([3, 1, 2]), np.searchsorted([1, 3, 5], 4))
---
import numpy as np
dt = np.dtype([("name", "U5"), ("age", int)])
t = np.array([("Ann", 30), ("Bob", 25)], dt)
print(np.sort(t, order="age"), t["name"], t[t["age"] > 26], dt)
---
import numpy as np
F = np.array([[1, 1], [1, 0]], dtype=object)
print(np.linalg.matrix_power(F, 90)[0, 1], np.array([2**70, 1]), np.array(2**62) * 2)
---
import numpy as np
x = np.fft.fft([1, 2, 3, 4])
print(x, np.fft.ifft(x).real, np.fft.fftfreq(4), np.abs(np.fft.rfft(np.ones(4))))
---
import numpy as np
grid = np.zeros((5, 5), int)
grid[1:4, 2] = 1
for _ in range(2):
    n = sum(np.roll(grid, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j)
    grid = ((n == 3) | (grid & (n == 2))).astype(int)
    print(grid)
---
import numpy as np
q, r = np.linalg.qr(np.array([[1., 2], [3, 4]]))
u, s, vt = np.linalg.svd(np.array([[1., 0], [0, 2]]))
print(np.abs(q @ r).round(6), s, np.linalg.lstsq(np.array([[1, 1], [1, 2], [1, 3]]), [1, 2, 2.5])[0].round(6))
---
import numpy as np
print(np.einsum("ij,jk->ik", np.eye(2), [[1, 2], [3, 4]]), np.kron([1, 2], [1, 1]), np.cross([1, 0, 0], [0, 1, 0]))
print(np.meshgrid([1, 2], [3, 4]), np.vstack([[1], [2]]), np.tile([1, 2], 2), np.gcd(12, 18))
""",
    "scipy": r"""
from scipy.optimize import minimize, brentq, linprog
print(brentq(lambda x: x**3 - x - 2, 1, 2), minimize(lambda v: (v[0] - 1)**2 + v[1]**2, [0, 0]).x.round(4))
print(linprog([-1, -2], A_ub=[[1, 1]], b_ub=[4], bounds=[(0, 3), (0, 2)]).fun)
---
from scipy.integrate import quad, solve_ivp
print(quad(lambda x: x**2, 0, 3), solve_ivp(lambda t, y: -y, (0, 1), [1.0]).y[0, -1].round(6))
---
from scipy import stats
print(stats.norm.cdf(1.96), stats.binom.pmf(3, 10, 0.5), stats.ttest_ind([1, 2, 3], [2, 3, 4]).pvalue)
print(stats.linregress([0, 1, 2], [1, 3, 5.1]).slope, stats.chi2.ppf(0.95, 3))
---
from scipy.special import comb, gamma, erf, binom, factorial
from scipy.spatial import ConvexHull
print(comb(10, 3, exact=True), gamma(5.5), erf(0.5), factorial(20, exact=True))
print(ConvexHull([[0, 0], [1, 0], [1, 1], [0, 1], [.5, .5]]).volume)
---
from scipy.linalg import expm, lu, null_space
import numpy as np
print(expm(np.zeros((2, 2))), lu(np.array([[1., 2], [3, 4]]))[2], null_space([[1, 1]]).shape)
---
from scipy.interpolate import CubicSpline, interp1d
from scipy.sparse import csr_matrix
print(CubicSpline([0, 1, 2, 3], [0, 1, 8, 27])(1.5), interp1d([0, 1], [0, 10])(0.3))
print(csr_matrix([[0, 1], [2, 0]]).toarray())
---
from scipy.optimize import linear_sum_assignment, fsolve, curve_fit
import numpy as np
print(linear_sum_assignment(np.array([[4, 1, 3], [2, 0, 5], [3, 2, 2]])))
print(fsolve(lambda v: [v[0] + v[1] - 3, v[0] * v[1] - 2], [0.5, 3]).round(6))
""",
    "networkx": r"""
import networkx as nx
G = nx.Graph([(1, 2), (2, 3), (3, 4), (4, 1), (1, 3)])
print(nx.shortest_path(G, 2, 4), nx.diameter(G), dict(G.degree()), nx.is_bipartite(G), G)
---
import networkx as nx
G = nx.DiGraph()
G.add_weighted_edges_from([("s", "a", 4), ("s", "b", 1), ("b", "a", 2), ("a", "t", 1)])
print(nx.dijkstra_path(G, "s", "t"), nx.dijkstra_path_length(G, "s", "t"), list(nx.topological_sort(G)))
---
import networkx as nx
G = nx.petersen_graph()
print(nx.number_of_edges(G), nx.is_connected(G), max(nx.greedy_color(G).values()) + 1, nx.is_planar(G))
T = nx.minimum_spanning_tree(nx.complete_graph(5))
print(sorted(T.edges()), list(nx.connected_components(nx.Graph([(1, 2), (3, 4)]))))
---
import networkx as nx
G = nx.DiGraph()
G.add_edge("s", "a", capacity=3); G.add_edge("a", "t", capacity=2); G.add_edge("s", "t", capacity=1)
print(nx.maximum_flow_value(G, "s", "t"), nx.pagerank(nx.cycle_graph(3)), nx.adjacency_matrix(G).todense())
---
import networkx as nx
G = nx.gnp_random_graph(12, 0.3, seed=7)
print(sorted(G.edges())[:8], nx.density(G), nx.average_clustering(G), sorted(nx.find_cliques(G))[:2])
""",
    "probability": r"""
import random
random.seed(42)
print(random.random(), random.randint(1, 6), random.sample(range(100), 5), random.gauss(0, 1))
x = list(range(10)); random.shuffle(x); print(x, random.choices("abc", [1, 2, 3], k=6))
---
import random
rng = random.Random(2024)
inside = sum(rng.random() ** 2 + rng.random() ** 2 < 1 for _ in range(100000))
print(4 * inside / 100000, rng.getstate()[0], rng.expovariate(2), rng.betavariate(1, 2))
---
from fractions import Fraction
from itertools import product
rolls = list(product(range(1, 7), repeat=2))
print(Fraction(sum(a + b == 7 for a, b in rolls), len(rolls)), Fraction(sum(max(r) for r in rolls), 36))
---
p = {0: 1.0}
for _ in range(10):
    q = {}
    for s, v in p.items():
        for step in (-1, 1):
            q[s + step] = q.get(s + step, 0) + v / 2
    p = q
print(sorted(p.items()), sum(p.values()))
---
import statistics as st
d = [2, 4, 4, 4, 5, 5, 7, 9]
print(st.mean(d), st.median(d), st.mode(d), st.pstdev(d), st.variance(d), st.quantiles(d, n=4))
print(st.NormalDist(0, 1).cdf(1.0), st.correlation([1, 2, 3], [2, 4, 7]), st.linear_regression([1, 2], [3, 5]))
---
import numpy as np
P = np.array([[0.9, 0.1], [0.5, 0.5]])
print(np.linalg.matrix_power(P, 50).round(8))
rng = np.random.default_rng(7)
print(rng.binomial(10, 0.3, 5), rng.poisson(4, 5), rng.exponential(2, 2).round(6))
---
from sympy.stats import Die, P, E, variance, Binomial, density, Normal
X, Y = Die("X", 6), Die("Y", 6)
print(P(X + Y > 9), E(X * Y), variance(X), density(Binomial("B", 3, 0.5)).dict)
print(E(Normal("N", 2, 3) ** 2))
---
from functools import lru_cache
@lru_cache(None)
def coupons(n, have=0):
    return 0 if have == n else n / (n - have) + coupons(n, have + 1)
print(coupons(6), coupons(365), coupons.cache_info().misses)
---
import random
random.seed(7)
doors = sum(1 for _ in range(10000) if random.randrange(3) != random.randrange(3))
print(doors, doors / 10000, random.getrandbits(64), random.uniform(1, 2))
""",
    "geometry": r"""
from sympy import Point, Line, Circle, Triangle, Polygon, Segment
t = Triangle(Point(0, 0), Point(4, 0), Point(0, 3))
print(t.area, t.circumcircle, t.incircle.radius, t.centroid, t.is_right(), t.orthocenter)
print(Line(Point(0, 0), Point(1, 1)).intersection(Circle(Point(0, 0), 5)))
---
def shoelace(points):
    return abs(sum(x1*y2 - x2*y1 for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1]))) / 2
print(shoelace([(0, 0), (4, 0), (4, 3), (0, 3)]), shoelace([(0, 0), (5, 1), (2, 7)]))
---
def hull(points):
    points = sorted(set(points))
    def half(ps):
        out = []
        for p in ps:
            while len(out) > 1 and (out[-1][0]-out[-2][0])*(p[1]-out[-2][1]) <= (out[-1][1]-out[-2][1])*(p[0]-out[-2][0]):
                out.pop()
            out.append(p)
        return out[:-1]
    return half(points) + half(points[::-1])
print(hull([(x * 7 % 11, x * 5 % 13) for x in range(20)]))
---
import math
a, b, c = 13, 14, 15
s = (a + b + c) / 2
area = math.sqrt(s * (s - a) * (s - b) * (s - c))
print(area, 2 * area / a, math.degrees(math.acos((a*a + b*b - c*c) / (2*a*b))), area / s)
---
from sympy import symbols, Eq, solve, sqrt, pi, cos, Rational, simplify, tan
r, h = symbols("r h", positive=True)
print(solve(Eq(pi*r**2*h, 100*pi), h), simplify(cos(pi/5)), tan(pi/12).simplify(), sqrt(2)*sqrt(8))
---
import math
from dataclasses import dataclass
@dataclass(frozen=True, order=True)
class Vec:
    x: float
    y: float = 0.0
    def __add__(self, o): return Vec(self.x + o.x, self.y + o.y)
    def __abs__(self): return math.hypot(self.x, self.y)
print(Vec(3, 4) + Vec(1), abs(Vec(3, 4)), sorted([Vec(2), Vec(1, 5)]), hash(Vec(1)) == hash(Vec(1.0)))
---
from math import gcd
def lattice(points):
    n = len(points)
    double = abs(sum(points[i][0]*points[(i+1) % n][1] - points[(i+1) % n][0]*points[i][1] for i in range(n)))
    edge = sum(gcd(abs(points[i][0]-points[(i+1) % n][0]), abs(points[i][1]-points[(i+1) % n][1])) for i in range(n))
    return (double - edge + 2) // 2, edge
print(lattice([(0, 0), (6, 0), (6, 4), (0, 4)]), lattice([(0, 0), (5, 2), (1, 7)]))
""",
    "algorithms": r"""
import heapq
graph = {"A": {"B": 1, "C": 4}, "B": {"C": 2, "D": 5}, "C": {"D": 1}, "D": {}}
dist, heap = {}, [(0, "A")]
while heap:
    d, u = heapq.heappop(heap)
    if u not in dist:
        dist[u] = d
        for v, w in graph[u].items():
            heapq.heappush(heap, (d + w, v))
print(dist)
---
def knapsack(items, cap):
    best = [0] * (cap + 1)
    for weight, value in items:
        for c in range(cap, weight - 1, -1):
            best[c] = max(best[c], best[c - weight] + value)
    return best[cap]
print(knapsack([(12, 4), (2, 2), (1, 1), (1, 2), (4, 10)], 15))
---
def lcs(a, b):
    t = [[""] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            t[i+1][j+1] = t[i][j] + x if x == y else max(t[i+1][j], t[i][j+1], key=len)
    return t[-1][-1]
print(lcs("AGGTABQWERTY", "GXTXAYBQRTY"))
---
def edit(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        prev, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            prev, row[j] = row[j], min(row[j] + 1, row[j-1] + 1, prev + (x != y))
    return row[-1]
print(edit("kitten", "sitting"), edit("", "abc"))
---
from collections import deque
maze = ["S.#.....", ".##.###.", "....#...", ".##...#E"]
start = (0, 0)
seen, queue = {start: 0}, deque([start])
while queue:
    r, c = queue.popleft()
    if maze[r][c] == "E":
        print("steps", seen[r, c])
    for nr, nc in ((r+1, c), (r-1, c), (r, c+1), (r, c-1)):
        if 0 <= nr < 4 and 0 <= nc < 8 and maze[nr][nc] != "#" and (nr, nc) not in seen:
            seen[nr, nc] = seen[r, c] + 1
            queue.append((nr, nc))
---
def hanoi(n, a, b, c, moves):
    if n:
        hanoi(n - 1, a, c, b, moves)
        moves.append(a + c)
        hanoi(n - 1, b, a, c, moves)
    return moves
m = hanoi(5, "A", "B", "C", [])
print(len(m), m[:8])
---
def quicksort(x):
    return x if len(x) < 2 else quicksort([y for y in x[1:] if y < x[0]]) + [x[0]] + quicksort([y for y in x[1:] if y >= x[0]])
import bisect
s = quicksort([(i * 7919) % 101 for i in range(20)])
print(s, bisect.bisect_left(s, 50), sorted(s, key=lambda v: (-v % 3, v)))
---
def solve(board):
    for i, row in enumerate(board):
        for j, v in enumerate(row):
            if v == 0:
                for n in range(1, 5):
                    box = [board[i//2*2+a][j//2*2+b] for a in (0, 1) for b in (0, 1)]
                    if n not in row and n not in [r[j] for r in board] and n not in box:
                        row[j] = n
                        if solve(board):
                            return True
                        row[j] = 0
                return False
    return True
b = [[1, 0, 0, 0], [0, 0, 3, 0], [0, 4, 0, 0], [0, 0, 0, 2]]
print(solve(b), *b, sep="\n")
---
parent = list(range(10))
def find(x):
    while parent[x] != x:
        parent[x] = parent[parent[x]]
        x = parent[x]
    return x
for a, b in [(1, 2), (3, 4), (2, 3), (7, 8)]:
    parent[find(a)] = find(b)
print([find(i) for i in range(10)], len({find(i) for i in range(10)}))
---
class Trie(dict):
    def add(self, word):
        node = self
        for c in word:
            node = node.setdefault(c, Trie())
        node["$"] = True
t = Trie()
for w in ("to", "tea", "ten"):
    t.add(w)
print(t)
---
A = [[1, 2, -1, 8], [-3, -1, 2, -11], [-2, 1, 2, -3]]
from fractions import Fraction
A = [[Fraction(v) for v in row] for row in A]
for i in range(3):
    p = next(r for r in range(i, 3) if A[r][i])
    A[i], A[p] = A[p], A[i]
    A[i] = [v / A[i][i] for v in A[i]]
    for r in range(3):
        if r != i:
            A[r] = [a - A[r][i] * b for a, b in zip(A[r], A[i])]
print([str(row[-1]) for row in A])
---
def life(cells):
    from collections import Counter
    near = Counter((x + i, y + j) for x, y in cells for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j)
    return {c for c, n in near.items() if n == 3 or n == 2 and c in cells}
cells = {(1, 0), (2, 1), (0, 2), (1, 2), (2, 2)}
for _ in range(8):
    cells = life(cells)
print(sorted(cells))
""",
    "collections": r"""
from collections import Counter, defaultdict, OrderedDict, ChainMap
c = Counter("mississippi")
print(c, c.most_common(2), c - Counter("miss"), c + Counter("x"), sum(c.values()))
d = defaultdict(list); d["a"].append(1); print(d, ChainMap({"a": 1}, {"b": 2}), OrderedDict(a=1))
---
from collections import namedtuple, deque
P = namedtuple("P", "x y", defaults=[0])
q = deque([1, 2, 3], maxlen=3); q.append(4); q.rotate(1)
print(P(1), P(1, 2)._replace(x=9), P._fields, q, list(reversed(q)))
---
print({"b": 1, "a": 2} | {"c": 3}, {1, 2, 3} & {2, 3, 4}, {1, 2} ^ {2, 3}, frozenset("abc") <= set("abcd"))
print({w: len(w) for w in "the quick brown fox".split()}, [*range(3), *"ab"], dict(zip("ab", (1, 2))))
---
print({"apple", "banana", "cherry", "date"}, set("hello world"), {("a", 1), ("b", 2)}, {None, True, "x"})
---
print(hash("abc"), hash((1, "a")), hash(1.5), hash(frozenset({"x", "y"})), sorted({"z", "y"}, key=hash))
---
matrix = [[1, 2, 3], [4, 5, 6]]
print([*zip(*matrix)], [v for row in matrix for v in row], [row[::-1] for row in matrix])
a, *b, c = range(6)
print(a, b, c, matrix[0][-2:], slice(1, 5, 2).indices(4))
---
x = [1, 2, 3]
y = x
y += [4]
print(x, x is y, [[]] * 3, (lambda l: l.append(l) or l)([1]), x[:] == x, id(x) == id(y))
---
import array, struct
a = array.array("i", [1, 2, 3])
print(a, a.tobytes(), struct.pack("<If", 1, 2.5), struct.unpack(">h", b"\x01\x02"), bytearray(b"ab"))
---
from enum import Enum, IntFlag, auto
class Color(Enum):
    RED = auto()
    BLUE = "b"
class Perm(IntFlag):
    R = 4
    W = 2
print(Color.RED, repr(Color.BLUE), Color("b"), list(Color), Perm.R | Perm.W, Perm(6), Perm.R.name)
---
from types import SimpleNamespace, MappingProxyType
import copy
n = SimpleNamespace(a=[1], b=2)
m = copy.deepcopy(n); m.a.append(2)
print(n, m, MappingProxyType({"k": 1}), copy.copy(n).a is n.a)
---
import sys
print(sys.getsizeof([]) > 0, sys.version_info[:2] >= (3, 8), sys.byteorder, sys.getrecursionlimit())
print(__name__, __doc__, type(__builtins__).__name__, sys.flags.hash_randomization, "__file__" in globals())
""",
    "strings": r"""
s = "The quick brown fox"
print(s.upper(), s[::-1], s.split(), s.replace("quick", "slow"), s.find("fox"), s.title().swapcase())
print(s.center(30, "*"), s.zfill(25), s.partition(" "), "a,b,,c".split(","), " x ".strip() + "|")
---
name, value = "pi", 3.14159265
print(f"{name!r:>10}|{value:08.3f}|{value:+.2e}|{1234567:,}|{0.256:.1%}|{42:#b}|{name:^7}|{value=:.2f}")
print("{0:>{w}} {1[0]} {d[k]}".format("a", "bc", w=4, d={"k": 1}), "%05d|%-5s|%x" % (42, "ab", 255))
---
text = "na\u00efve caf\u00e9 \u4e2d\u6587 \U0001f600"
print(text, len(text), text.encode(), text.casefold(), ascii(text), [hex(ord(c)) for c in text[-2:]])
---
import unicodedata
print(unicodedata.name("\u00e9"), unicodedata.normalize("NFD", "\u00e9").encode(), "\u00df".upper(), "\u0130".lower())
print("\u2264 \u2211 \u221a \u03c0 \u2192 \u2460", "e\u0301" == "\u00e9", "\N{GREEK SMALL LETTER ALPHA}")
---
import re
print(re.findall(r"\b\w{5}\b", "hello world again"), re.sub(r"(\d+)", lambda m: str(int(m[1]) * 2), "a1b22"))
m = re.match(r"(?P<y>\d{4})-(?P<m>\d\d)", "2024-02-29")
print(m, m.groupdict(), m.span("m"), re.split(r"[,;]\s*", "a, b;c"), re.fullmatch("a+", "aab"))
---
import string, textwrap
print(string.Template("$who likes ${what}").substitute(who="Tim", what="kung pao"), string.ascii_lowercase)
print(textwrap.fill("The quick brown fox jumps over the lazy dog", 20), textwrap.dedent("  a\n    b"))
---
def caesar(s, k):
    return "".join(chr((ord(c) - 97 + k) % 26 + 97) if c.islower() else c for c in s)
print(caesar("hello, world", 3), caesar(caesar("abc", 5), -5), str.maketrans("ab", "ba"))
---
import base64, hashlib, zlib, binascii
print(base64.b64encode(b"hello"), hashlib.sha256(b"x").hexdigest(), zlib.crc32(b"abc"), binascii.hexlify(b"\x01"))
---
from difflib import SequenceMatcher, get_close_matches, unified_diff
print(SequenceMatcher(None, "abcd", "bcde").ratio(), get_close_matches("appel", ["ape", "apple"]))
print(*unified_diff(["a\n", "b\n"], ["a\n", "c\n"]), sep="")
---
roman = [(1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]
def to_roman(n):
    out = ""
    for v, r in roman:
        out += r * (n // v)
        n %= v
    return out
print([to_roman(n) for n in (1, 4, 9, 14, 40, 90, 400, 1994, 2024)])
---
print(repr("tab\t nl\n q' d\" \\ \x00 \x7f"), "\x41\u0042", r"\n", b"\xff\x00", "a" "b", 'it''s', '''x
y''')
---
print("tab\tx", "bell\a", "cr\rover", "form\f", "esc\x1b[1mbold\x1b[0m", "nbsp\u00a0", "zero\u200bwidth", sep="\n")
---
import json
d = {"b": [1, 2.5, None, True], "a": {"x": "\u00e9"}}
print(json.dumps(d), json.dumps(d, indent=2, sort_keys=True, ensure_ascii=False), json.loads('[1e3, "\\u00e9"]'))
---
import csv, io
out = io.StringIO()
csv.writer(out).writerows([["a", "b,c"], [1, 'say "hi"']])
print(repr(out.getvalue()), list(csv.DictReader(io.StringIO("x,y\n1,2\n"))))
---
import pprint
pprint.pprint({"numbers": list(range(30)), "nested": {"key": ["value"] * 6, "tuple": (1,)}}, width=50)
""",
    "classes": r"""
class Shape:
    def area(self): raise NotImplementedError
    def __repr__(self): return f"{type(self).__name__}({self.area()})"
class Square(Shape):
    def __init__(self, s): self.s = s
    def area(self): return self.s ** 2
class Cube(Square):
    def area(self): return 6 * super().area()
print([Square(2), Cube(2)], Cube.__mro__, isinstance(Cube(1), Shape), issubclass(Square, Cube))
---
from dataclasses import dataclass, field, asdict, replace
@dataclass
class Item:
    name: str
    price: float = 0.0
    tags: list = field(default_factory=list)
    def __post_init__(self): self.price = round(self.price, 2)
i = Item("pen", 1.239)
print(i, asdict(i), replace(i, name="ink"), i == Item("pen", 1.24), Item.__dataclass_fields__.keys())
---
class Account:
    def __init__(self): self._b = 0
    @property
    def balance(self): return self._b
    @balance.setter
    def balance(self, v):
        if v < 0: raise ValueError("negative")
        self._b = v
    @classmethod
    def of(cls, v): a = cls(); a.balance = v; return a
    @staticmethod
    def bank(): return "B"
a = Account.of(5)
a.balance += 3
print(a.balance, Account.bank(), hasattr(a, "_b"), vars(a))
---
class Poly:
    def __init__(self, *c): self.c = c
    def __call__(self, x): return sum(a * x**i for i, a in enumerate(self.c))
    def __mul__(self, o):
        out = [0] * (len(self.c) + len(o.c) - 1)
        for i, a in enumerate(self.c):
            for j, b in enumerate(o.c):
                out[i + j] += a * b
        return Poly(*out)
    def __len__(self): return len(self.c)
    def __getitem__(self, i): return self.c[i]
    def __eq__(self, o): return self.c == o.c
    def __bool__(self): return any(self.c)
p = Poly(1, 1) * Poly(1, 1)
print(p.c, p(2), len(p), list(p), p == Poly(1, 2, 1), bool(Poly(0)))
---
from abc import ABC, abstractmethod
class Base(ABC):
    @abstractmethod
    def f(self): ...
try:
    Base()
except TypeError as e:
    print(e)
---
class Meta(type):
    def __new__(m, name, bases, ns):
        ns["tag"] = name.lower()
        return super().__new__(m, name, bases, ns)
class Thing(metaclass=Meta): __slots__ = ("a",)
t = Thing()
try:
    t.b = 1
except AttributeError as e:
    print(Thing.tag, e, type(Thing))
---
class Fib:
    def __init__(self, n): self.n = n
    def __iter__(self):
        a, b = 0, 1
        for _ in range(self.n):
            yield a
            a, b = b, a + b
    def __contains__(self, x): return x in list(self)
print(list(Fib(15)), 21 in Fib(10), max(Fib(12)), sum(Fib(20)))
---
from functools import total_ordering, singledispatch, cached_property, partial, wraps
@total_ordering
class V:
    def __init__(self, v): self.v = v
    def __eq__(self, o): return self.v == o.v
    def __lt__(self, o): return self.v < o.v
    @cached_property
    def slow(self): print("computed"); return self.v * 2
@singledispatch
def show(x): return "any"
@show.register
def _(x: int): return "int"
v = V(2)
print(V(1) <= v, v.slow, v.slow, show(1), show("a"), partial(pow, 2)(5))
---
from typing import NamedTuple, TypedDict, Protocol, Generic, TypeVar
T = TypeVar("T")
class Box(Generic[T]):
    def __init__(self, v: T): self.v = v
class Pt(NamedTuple):
    x: int
    y: int = 2
class Movie(TypedDict): title: str
print(Pt(1), Box[int](3).v, Movie(title="x"), Box[int], list[int], int | None, Pt.__annotations__)
---
class R:
    def __enter__(self): print("in"); return self
    def __exit__(self, t, v, tb): print("out", t.__name__ if t else None, v); return True
with R() as r:
    1 / 0
print("after")
---
class A:
    count = 0
    def __init_subclass__(cls, **kw): A.count += 1
    def __getattr__(self, name): return f"no {name}"
    def __format__(self, spec): return f"<{spec}>"
class B(A): pass
print(A.count, B().zzz, f"{B():abc}", B.__name__, B.__qualname__, B.__module__)
""",
    "functions": r"""
def gen():
    x = yield 1
    print("got", x)
    try:
        yield x * 2
    finally:
        print("closed")
g = gen()
print(next(g), g.send(5))
g.close()
print(list(x * x for x in range(5)))
---
def counter():
    n = 0
    def inc(by=1):
        nonlocal n
        n += by
        return n
    return inc
c = counter()
print(c(), c(5), c(), counter.__code__.co_varnames, inc := 3)
---
def f(a, /, b, *args, c=3, **kw): return a, b, args, c, kw
print(f(1, 2), f(1, 2, 3, c=4, d=5), f(*range(4), **{"z": 0}))
fs = [lambda i=i: i * i for i in range(4)]
print([g() for g in fs], (lambda *a: sum(a))(1, 2, 3))
---
import functools
def memo(f):
    cache = {}
    @functools.wraps(f)
    def w(*a):
        if a not in cache:
            cache[a] = f(*a)
        return cache[a]
    return w
@memo
def fib(n):
    "fib"
    return n if n < 2 else fib(n - 1) + fib(n - 2)
print(fib(90), fib.__name__, fib.__doc__)
---
def ack(m, n):
    return n + 1 if m == 0 else ack(m - 1, 1) if n == 0 else ack(m - 1, ack(m, n - 1))
print(ack(2, 3), [ack(1, n) for n in range(5)])
---
import sys
sys.setrecursionlimit(20000)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
print(depth(9000), sys.getrecursionlimit())
---
def classify(x):
    match x:
        case 0: return "zero"
        case int(n) if n < 0: return f"negative {n}"
        case [a, *rest]: return f"list {a} {rest}"
        case {"k": v, **other}: return f"dict {v} {other}"
        case str() | bytes(): return "text"
        case complex(real=r): return f"complex {r}"
        case _: return "other"
print([classify(x) for x in (0, -4, [1, 2, 3], {"k": 1, "j": 2}, "s", 2j, None)])
---
def flatten(x):
    for y in x:
        if isinstance(y, list):
            yield from flatten(y)
        else:
            yield y
print(list(flatten([1, [2, [3, [4]], 5]])), (n := 10), [y := 1, y**2], any((w := k) > 3 for k in range(9)), w)
---
for i in range(2, 20):
    for j in range(2, i):
        if i % j == 0:
            break
    else:
        print(i, end=" ")
else:
    print("done")
while True:
    break
---
import inspect
def area(r: float, *, scale: int = 1) -> float:
    "Area."
    return 3 * r
print(inspect.signature(area), inspect.getsource(area), inspect.getdoc(area), area.__kwdefaults__)
---
from contextlib import contextmanager, suppress, redirect_stdout, ExitStack
import io
@contextmanager
def tag(t):
    print(f"<{t}>")
    yield
    print(f"</{t}>")
with tag("a"), suppress(ZeroDivisionError):
    1 / 0
with redirect_stdout(io.StringIO()) as f:
    print("hidden")
print(repr(f.getvalue()))
---
exec("a = 5\ndef g(): return a")
print(g(), eval("a + 1"), eval(compile("a * 2", "s", "eval")), [k for k in globals() if not k.startswith("_")])
---
global_x = 1
def change():
    global global_x
    global_x += 1
    local = sorted(locals())
    return local
print(change(), global_x, callable(change), "global_x" in globals())
""",
    "output": r"""
print(1, 2, 3, sep="-", end="!\n")
print("no newline", end="")
print()
print("flushed", flush=True)
print(*[], sep=",")
print("a\n\nb\n")
---
import sys
n = sys.stdout.write("written\n")
sys.stdout.writelines(["a\n", "b\n"])
sys.stderr.write("to stderr\n")
print(n, sys.stdout.encoding, sys.stdout.isatty(), file=sys.stdout)
---
import sys
sys.stdout.write("no line break at the end")
---
import sys
sys.stdout.buffer.write(b"bytes\n")
sys.stdout.flush()
print("text", flush=True)
sys.stdout.buffer.write("\u00e9\n".encode())
---
print("x" * 300000)
print("end")
---
for i in range(20000):
    print(i, i * i)
---
import os
os.write(1, b"raw\n")
print("then text")
---
import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
logging.info("to stderr")
logging.warning("this too")
print("out")
---
import warnings
warnings.warn("careful", DeprecationWarning)
warnings.warn("careful")
print("warned")
---
import sys, io
old, sys.stdout = sys.stdout, io.StringIO()
print("captured")
text, sys.stdout = sys.stdout.getvalue(), old
print(text.upper())
---
import atexit
@atexit.register
def bye():
    print("bye")
atexit.register(print, "first")
print("main")
---
rows = [("Ann", 3.5), ("Bartholomew", 22.25)]
print(f"{'name':<12}|{'value':>8}")
print("-" * 21)
for n, v in rows:
    print(f"{n:<12}|{v:>8.2f}")
---
def draw(n):
    for i in range(n):
        print(" " * (n - i - 1) + "*" * (2 * i + 1))
draw(6)
---
print("one"); print("two") if True else None; x = 5; x
print(x)
---
print(None, True, ..., NotImplemented, print, type(print), len, int, Exception, range(3), b"x")
---
import sys
print(sys.stdin.read(), sys.stdin.isatty(), list(sys.stdin), sys.argv)
""",
    "system": r"""
import datetime as dt
d = dt.date(2024, 2, 29)
print(d + dt.timedelta(days=365), d.strftime("%A %d %B %Y"), d.isocalendar(), (dt.date(2025, 1, 1) - d).days)
print(dt.datetime(2024, 1, 1, 12, tzinfo=dt.timezone.utc).isoformat(), dt.datetime.strptime("3/4/21", "%d/%m/%y"))
---
import calendar
print(calendar.isleap(2000), calendar.monthrange(2024, 2), calendar.month(2024, 2))
print(sum(calendar.weekday(y, m, 1) == 6 for y in range(1901, 2001) for m in range(1, 13)))
---
import os, pathlib, tempfile
p = pathlib.Path("notes.txt")
p.write_text("a\nb\n")
print(p.read_text(), p.stat().st_size, p.suffix, p.exists(), sorted(x.name for x in p.parent.glob("*.txt")))
with tempfile.TemporaryDirectory() as t:
    print(os.path.isdir(t))
p.unlink()
print(os.path.join("a", "b"), os.path.splitext("x.tar.gz"), p.exists())
---
with open("data.csv", "w") as f:
    f.writelines(f"{i},{i * i}\n" for i in range(5))
with open("data.csv") as f:
    print(sum(int(line.split(",")[1]) for line in f))
import os
os.remove("data.csv")
---
import threading
lock, total = threading.Lock(), []
def work(i):
    with lock:
        total.append(i * i)
ts = [threading.Thread(target=work, args=(i,)) for i in range(8)]
[t.start() for t in ts]
[t.join() for t in ts]
print(sorted(total), threading.current_thread().name, threading.active_count())
---
from concurrent.futures import ThreadPoolExecutor, as_completed
with ThreadPoolExecutor(4) as ex:
    print(list(ex.map(lambda x: x ** 2, range(6))), sorted(f.result() for f in as_completed([ex.submit(pow, 2, k) for k in range(4)])))
---
import threading, time
def late():
    time.sleep(0.05)
    print("late")
threading.Thread(target=late).start()
print("main ends")
---
import queue, threading
q = queue.Queue()
def worker():
    while (x := q.get()) is not None:
        print("job", x)
t = threading.Thread(target=worker, daemon=True)
t.start()
for i in range(3): q.put(i)
q.put(None)
t.join()
---
import asyncio
async def job(n):
    await asyncio.sleep(0.01 * n)
    return n * n
async def main():
    return await asyncio.gather(*(job(n) for n in range(4)))
print(asyncio.run(main()))
---
import asyncio
async def ticks():
    for i in range(3):
        yield i
        await asyncio.sleep(0)
async def main():
    async with asyncio.timeout(1):
        print([i async for i in ticks()])
    try:
        await asyncio.wait_for(asyncio.sleep(1), 0.01)
    except asyncio.TimeoutError as e:
        print("timeout", repr(e))
    q = asyncio.Queue()
    await q.put(1)
    print(await q.get(), q.empty())
asyncio.run(main())
---
import time
t = time.perf_counter()
time.sleep(0.01)
print(time.perf_counter() - t > 0.009, time.gmtime(0)[:6], time.strftime("%Y", time.gmtime(10**9)))
---
import pickle, shelve, io
class P:
    def __init__(self, x): self.x = x
    def __eq__(self, o): return self.x == o.x
print(pickle.loads(pickle.dumps(P([1, 2]))) == P([1, 2]), len(pickle.dumps({"a": 1}, protocol=4)), pickle.dumps(1))
---
import sqlite3
db = sqlite3.connect(":memory:")
db.execute("create table t (n int, s text)")
db.executemany("insert into t values (?, ?)", [(1, "a"), (2, "b"), (3, "a")])
print(db.execute("select s, sum(n) from t group by s order by s").fetchall())
---
import argparse, getopt, configparser
p = argparse.ArgumentParser(prog="x")
p.add_argument("--n", type=int, default=3)
print(p.parse_args([]), p.parse_args(["--n", "5"]).n, p.format_usage())
---
import ast, dis, io, timeit
print(ast.dump(ast.parse("1 + 2", mode="eval")), ast.literal_eval("[1, (2, 3)]"), ast.unparse(ast.parse("x=1")))
---
import uuid, secrets, platform
print(uuid.uuid5(uuid.NAMESPACE_DNS, "x"), len(secrets.token_hex(8)), platform.python_implementation())
---
import weakref, gc
class N: pass
n = N()
r = weakref.ref(n)
print(r() is n)
del n
print(r(), gc.isenabled())
---
import heapq, bisect, operator, graphlib
print(heapq.nlargest(2, [3, 1, 4]), list(heapq.merge([1, 4], [2, 3])), operator.itemgetter(1, 0)("ab"))
print(list(graphlib.TopologicalSorter({"d": {"b", "c"}, "b": {"a"}}).static_order())[-1])
---
import math, importlib, types, sys
print(importlib.import_module("json").__name__, "math" in sys.modules, types.FunctionType.__name__, math.__name__)
""",
    "errors": r"""
print("before")
1 / 0
---
def a(n): return b(n - 1)
def b(n): return [10, 20][n]
print(a(1))
print(a(5))
---
try:
    {}["missing"]
except KeyError as e:
    raise ValueError("wrapped") from e
---
try:
    int("x")
except ValueError:
    undefined_name
---
try:
    1 / 0
except ZeroDivisionError:
    raise RuntimeError("no cause") from None
---
class CustomError(Exception):
    def __init__(self, code): super().__init__(f"code {code}")
raise CustomError(7)
---
x = [1, 2, 3]
print(x[1])
print(x["a"])
---
import math
print(math.sqrt(4))
print(math.sqrt(-1))
---
print(int("12a"))
---
from sympy import symbols, solve
x = symbols("x")
print(solve(x - 1))
print(solve(x - y))
---
import numpy as np
print(np.ones(2) + np.ones(2))
np.ones((2, 3)) @ np.ones((2, 3))
---
import numpy as np
np.linalg.inv(np.zeros((2, 2)))
---
import sympy
sympy.Matrix([[1, 2], [2, 4]]).inv()
---
import not_a_module
---
from math import no_such_name
---
for i in range(3)
    print(i)
---
def f():
return 1
---
x = (1, 2
print(x)
---
print("unterminated)
---
	print("indented")
---
assert 1 + 1 == 3, "arithmetic"
---
assert False
---
raise Exception
---
raise KeyError("k")
---
raise ValueError("two\nlines")
---
raise ExceptionGroup("many", [ValueError(1), TypeError(2)])
---
e = ValueError("noted")
e.add_note("a note")
raise e
---
None.upper()
---
"a" + 1
---
def f(a, b): pass
f(1)
---
class C: pass
C().attribute
---
def deep(n): return deep(n + 1)
deep(0)
---
10 ** 10000
print(len(str(10 ** 4000)))
print(10 ** 5000)
---
2.0 ** 10000
---
next(iter([]))
---
def g():
    yield 1
    raise StopIteration
list(g())
---
del nothing
---
a, b = 1, 2, 3
---
open("/no/such/file")
---
"\ud800".encode()
---
print("\ud800")
---
b"\xff".decode()
---
import json
json.loads("{'a': 1}")
---
import re
re.compile("(")
---
n = int(input("number? "))
---
while True:
    line = input()
---
import decimal
decimal.Decimal("abc")
---
import fractions
fractions.Fraction(1, 0)
---
import threading
def bad(): raise ValueError("in a thread")
t = threading.Thread(target=bad); t.start(); t.join()
print("main goes on")
---
import asyncio
async def main():
    await asyncio.sleep(0)
    raise LookupError("in a coroutine")
asyncio.run(main())
---
import atexit
def bad(): raise ValueError("at exit")
atexit.register(bad)
print("done")
---
import sys
sys.exit()
---
import sys
print("bye")
sys.exit(3)
---
import sys
sys.exit("a message")
---
import sys
sys.exit([1, 2])
---
import sys
try:
    sys.exit(5)
finally:
    print("cleanup")
---
raise SystemExit(256)
---
exit()
---
quit(2)
---
import os
print("unflushed", end="", flush=True)
os._exit(4)
---
import sys
def hook(t, v, tb): print("hook", t.__name__, v)
sys.excepthook = hook
raise ValueError("x")
---
import traceback
try:
    1 / 0
except ZeroDivisionError as e:
    print("".join(traceback.format_exception_only(e)), e.__traceback__.tb_lineno, type(e).__mro__)
---
def f():
    try:
        return "try"
    finally:
        print("finally")
try:
    print(f())
except* ValueError:
    pass
else:
    print("else")
---
import os
os.abort()
---
import os, signal
print("going", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
---
return 5
---
yield 1
---
print(f"{1 +}")
---
lst = [3, "a", 1]
print(sorted(lst))
---
import sympy as sp
x = sp.Symbol("x")
if x > 0:
    print("positive")
---
import numpy as np
a = np.array([1, 2])
if a == np.array([1, 2]):
    print("equal")
---
from decimal import Decimal
print(Decimal("1.1") + 1.1)
---
import __future__
from __future__ import annotations
print("late")
---
def outer():
    def inner():
        raise OSError(2, "No such thing", "f.txt")
    try:
        inner()
    except OSError as e:
        print(e.errno, e.filename, e.strerror)
        raise
outer()
""",
}

# Libraries that not every environment has.
_OPTIONAL = ("scipy", "networkx")


def _split(text: str) -> list[str]:
    return [part.strip("\n") + "\n" for part in text.split("\n---\n")]


def by_kind() -> dict[str, list[str]]:
    """The programs of each kind, without those whose libraries are not installed."""
    missing = [name for name in _OPTIONAL if importlib.util.find_spec(name) is None]
    absent = re.compile(rf"^(?:from|import) (?:{'|'.join(missing)})\b", re.MULTILINE)
    return {
        kind: [code for code in _split(text) if not (missing and absent.search(code))]
        for kind, text in _TABLE.items()
    }
