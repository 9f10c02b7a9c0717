"""The program's side: runs model-written code in a fresh process as plain `python main.py` would.

Differences to plain python: numpy and sympy are loaded already; `random`, numpy and sympy's own
numbers are seeded; the value of a trailing expression is shown if nothing was printed, as an
interactive python shows it; output is line-buffered, so that a program out of time keeps what it
printed; there is no main.py on disk; at the end only what is left of its own module is destroyed.
"""

import ast
import atexit
import builtins
import gc
import importlib
import linecache
import os
import random
import sys
import threading
import traceback
import types
from collections.abc import Callable
from os import _exit
from typing import NoReturn

_FILENAME = "main.py"
_VALUE = "__value_of_last_expression__"
_bits = random.Random()
_getrandbits = _bits.getrandbits


def run(code: bytes) -> NoReturn:
    """Runs `code` to its end and leaves the process with plain python's exit status."""
    status = 1
    try:
        status = _execute(code)
        # Of what only the collector of garbage ends, nothing else can have a last word. To look
        # for it where there is none would cost a small program a good part of its time.
        status = _finish(status, collect=b"__del__" in code or b"yield" in code)
    finally:
        _exit(status)


def prepare() -> None:
    """Does once what `run` does before and after a program's own code, to have it loaded."""
    linecache.getlines(_FILENAME)
    try:
        exec(compile(_parse(b"1 / 0"), _FILENAME, "exec"), {})
    except ZeroDivisionError as error:
        "".join(traceback.format_exception(error))
    seed(0)


def settle(folder: str) -> None:
    """What a process needs to run programs in `folder`."""
    sys.argv = [_FILENAME]
    sys.orig_argv = [sys.executable, _FILENAME]
    sys.path.insert(0, folder)
    sys.stdout.reconfigure(line_buffering=True)


def seed(number: int) -> None:
    """In the worker, before it forks: sets the next program's random numbers."""
    for name, seeder in SEEDERS.items():
        seeder(sys.modules.get(name) or importlib.import_module(name), number)


def _seed_numpy(numpy_random: types.ModuleType, number: int) -> None:
    numpy_random.seed(number % 2**32)
    _bits.seed(number)
    # Where a generator that is made without a seed takes its bits from.
    numpy_random.bit_generator.randbits = _getrandbits


SEEDERS = {
    "random": lambda module, number: module.seed(number),
    "numpy.random": _seed_numpy,
    "sympy.core.random": lambda module, number: module.seed(number),
}
"""Of each module with random numbers: what sets them, given the module and a number."""


def _parse(code: bytes) -> ast.Module:
    tree = ast.parse(code, _FILENAME)
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = tree.body[-1]
        target = ast.copy_location(ast.Name(_VALUE, ast.Store()), last)
        tree.body[-1] = ast.copy_location(ast.Assign([target], last.value), last)
    return tree


def _execute(code: bytes) -> int:
    module = types.ModuleType("__main__")
    module.__file__ = _FILENAME
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    lines = code.decode(errors="replace").splitlines(keepends=True)
    linecache.cache[_FILENAME] = (len(code), None, lines, _FILENAME)
    try:
        exec(compile(_parse(code), _FILENAME, "exec", dont_inherit=True), module.__dict__)
        _show(module.__dict__.pop(_VALUE, None))
    except SystemExit as error:
        return _exit_status(error)
    except BaseException as error:
        _report(error)
        return 1
    return 0


def _show(value: object) -> None:
    """The value of a trailing expression, if nothing was printed."""
    try:
        sys.stdout.flush()
        if value is None or os.fstat(1).st_size > 0:
            return
    except (OSError, ValueError, AttributeError):
        return  # it has closed or replaced its output
    sys.displayhook(value)


def _exit_status(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    _attempt(lambda: print(error.code, file=sys.stderr or sys.__stderr__))
    return 1


def _report(error: BaseException) -> None:
    """Prints the traceback, from the program's own first line on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != _FILENAME:
        trace = trace.tb_next
    try:
        if sys.excepthook is sys.__excepthook__:
            traceback.print_exception(type(error), error, trace)
        else:
            sys.excepthook(type(error), error, trace)
    except BaseException:
        _report_plainly(error, trace)


def _report_plainly(error: BaseException, trace: types.TracebackType | None) -> None:
    """Where memory is short, or what prints tracebacks was tampered with."""
    if isinstance(error, MemoryError):
        os.write(2, b"\nMemoryError\n")
    else:
        sys.__excepthook__(type(error), error, trace)


def _finish(status: int, *, collect: bool) -> int:
    """What the interpreter does at its end; returns the exit status, which that may change."""
    _attempt(lambda: threading._shutdown())
    _attempt(lambda: atexit._run_exitfuncs())
    _attempt(lambda: _destroy_main(collect))
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException:
            status = 120  # plain python's for output that could not be written
    return status


def _attempt(step: Callable[[], object]) -> None:
    """A failure is shown and changes nothing."""
    try:
        step()
    except BaseException as error:
        _report(error)


def _destroy_main(collect: bool) -> None:
    """Ends the program's objects, which may say something as they go."""
    builtins._ = None  # the value that was shown
    sys.modules.pop("__main__", None)
    if collect:
        gc.collect()
