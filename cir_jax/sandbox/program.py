"""The program's side: runs model-written code in a fresh process as plain `python main.py` would.

Differences to plain python: numpy and sympy are loaded already; `random` and numpy are seeded; the
value of a trailing expression is printed if nothing else was; output is line-buffered, so that a
program out of time keeps what it printed; objects still alive at the end are not destroyed.
"""

import ast
import atexit
import builtins
import linecache
import os
import random
import sys
import threading
import traceback
import types
from typing import NoReturn

_FILENAME = "main.py"
_VALUE = "__value_of_last_expression__"


def run(code: str, seed: int, folder: str, out_of_memory: memoryview) -> NoReturn:
    """Runs `code` to its end and leaves the process with plain python's exit status.

    Args:
      seed: for `random` and numpy.
      folder: the working directory.
      out_of_memory: its first byte becomes 1 if the program ends by a MemoryError.
    """
    status = 1
    try:
        _prepare(seed, folder)
        status = _finish(_execute(code, out_of_memory))
    finally:
        os._exit(status)


def _prepare(seed: int, folder: str) -> None:
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    os.environ.update(HOME=folder, TMPDIR=folder)
    sys.argv = [_FILENAME]
    sys.path.insert(0, folder)
    sys.stdout.reconfigure(line_buffering=True)


def _execute(code: str, out_of_memory: memoryview) -> int:
    module = types.ModuleType("__main__")
    module.__file__ = _FILENAME
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    linecache.cache[_FILENAME] = (len(code), None, code.splitlines(keepends=True), _FILENAME)
    try:
        tree = ast.parse(code, _FILENAME)
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = tree.body[-1]
            target = ast.copy_location(ast.Name(_VALUE, ast.Store()), last)
            tree.body[-1] = ast.copy_location(ast.Assign([target], last.value), last)
        exec(compile(tree, _FILENAME, "exec", dont_inherit=True), module.__dict__)
        value = module.__dict__.pop(_VALUE, None)
        sys.stdout.flush()
        if value is not None and os.fstat(1).st_size == 0:
            print(repr(value))
    except SystemExit as error:
        return _exit_status(error)
    except BaseException as error:
        if isinstance(error, MemoryError):
            out_of_memory[0] = 1
        _report(error)
        return 1
    return 0


def _exit_status(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _report(error: BaseException) -> None:
    """Prints the traceback, from the program's own first line on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != _FILENAME:
        trace = trace.tb_next
    if sys.excepthook is sys.__excepthook__:
        traceback.print_exception(type(error), error, trace)
    else:
        sys.excepthook(type(error), error, trace)


def _finish(status: int) -> int:
    """What the interpreter does at its end: waits for threads, exit functions, flushes."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            status = status or 120  # plain python's status for output that could not be written
    return status
