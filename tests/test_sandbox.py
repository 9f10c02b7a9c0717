"""The sandbox: programs behave as in plain python, and hostile ones harm nothing else."""

import dataclasses
import functools
import os
import signal
import subprocess
import time

import pytest

from cir_jax.config import ResultConfig
from cir_jax.records import ExecResult
from cir_jax.sandbox import text
from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.pool import Sandbox
from cir_jax.sandbox.text import ERROR_TEXTS

result_text = functools.partial(text.result_text, cfg=ResultConfig())
LIMITS = Limits(timeout_s=1.5, memory_bytes=2**29, output_bytes=100_000)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(LIMITS, num_workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def parallel():
    """A sandbox whose programs may start processes."""
    with Sandbox(dataclasses.replace(LIMITS, allow_processes=True), num_workers=1) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def other():
    """A second sandbox, of one worker, started with a secret in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET_TOKEN", "hidden-value")
        with Sandbox(LIMITS, num_workers=1) as sandbox:
            sandbox.submit("0").result(60)
            yield sandbox


def run(sandbox, code, **kwargs):
    return sandbox.submit(code, **kwargs).result(60)


def wait_for_spare(sandbox, num_processes):
    deadline = time.monotonic() + 20
    while len(sandbox.stats()["workers"]) < num_processes and time.monotonic() < deadline:
        time.sleep(0.02)


def num_processes(sandbox):
    """Processes of the ready workers and below, as the host sees them."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True)
    parents = {int(p): int(q) for p, q in map(str.split, listing.stdout.splitlines())}
    found = todo = set(sandbox.stats()["pids"])
    while todo:
        todo = {pid for pid, parent in parents.items() if parent in todo}
        found = found | todo
    return len(found)


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        ("print(1 + 1)", "2\n"),
        ("1 + 1", "2\n"),
        ("x = 3\nx ** 2", "9\n"),
        ("'text'", "'text'\n"),
        ("None", ""),
        ("x = 5", ""),
        ("", ""),
        ("# only a comment", ""),
        ("print('a')\n2", "a\n"),
        ("import os\n_ = os.write(1, b'raw')\n2", "raw"),
        ("n = []\nn.append(1)\nlen(n)", "1\n"),
        ("if __name__ == '__main__':\n    print('main')", "main\n"),
        ("import sys\nprint(sys.modules['__main__'].__dict__ is globals())", "True\n"),
        (
            "class A: pass\nimport pickle\nprint(type(pickle.loads(pickle.dumps(A()))) is A)",
            "True\n",
        ),
        ("import atexit\natexit.register(print, 'end')\nprint('start')", "start\nend\n"),
        ("import threading\nthreading.Timer(.1, print, ['late']).start()\nprint('a')", "a\nlate\n"),
        ("import sys\nsys.stdout.buffer.write(b'x\\xff\\0y')\nprint()", "x\ufffdy\n"),
        ("from sympy import *\nx = symbols('x')\nsolve(x**2 - 5*x + 6)", "[2, 3]\n"),
        ("import numpy as np\nprint(np.linalg.det(np.eye(3)))", "1.0\n"),
        ("import sys\nprint(sys.argv, sys.stdin.read())", "['main.py'] \n"),
        ("import os\nprint(os.listdir('.'))\nopen('f', 'w').close()", "[]\n"),
        ("import sys\nprint('out')\nsys.exit(0)", "out\n"),
        ("import statistics, decimal, uuid\nprint(statistics.mean([1, 3]))", "2\n"),
        ("import numpy as np\nnp.float64(0.5)", "np.float64(0.5)\n"),
        ("import numpy as np\nprint(np.float64(0.5))", "0.5\n"),
        ("import sympy\nsympy.Rational(1, 2)", "1/2\n"),
        ("import numpy as np\nnp.arange(3)", "array([0, 1, 2])\n"),
        ("import warnings\nwarnings.warn('w')\nprint(1)", "1\n"),
        ("import asyncio\nasync def f(): return 3\nprint(asyncio.run(f()))", "3\n"),
        ("import os\nprint(os.getcwd(), os.environ['HOME'])", "/tmp /tmp\n"),
        ("import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'abc'))", "3\n"),
        (
            "from concurrent.futures import ThreadPoolExecutor as T\n"
            "with T(32) as t: print(sum(t.map(abs, range(-9, 0))))",
            "45\n",
        ),
        ("import inspect\ndef f(): return 1\nprint(inspect.getsource(f))", "def f(): return 1\n\n"),
    ],
)
def test_runs_like_plain_python(sandbox, code, stdout):
    result = run(sandbox, code)
    assert (result.status, result.error) == ("ok", "")
    assert result.stdout == stdout
    assert 0 < result.wall_s < LIMITS.timeout_s


@pytest.mark.parametrize(
    ("code", "stdout", "error"),
    [
        ("print('before')\n1 / 0", "before\n", "ZeroDivisionError: division by zero"),
        ("def f(:", "", "SyntaxError: invalid syntax"),
        ("undefined", "", "NameError: name 'undefined' is not defined"),
        ("raise ValueError('Done')", "", "ValueError: Done"),
        ("raise TimeoutError('slow')", "", "TimeoutError: slow"),
        ("print('\\ud800')", "", "UnicodeEncodeError: "),
        ("input()", "", "EOFError: EOF when reading a line"),
        ("exit(3)", "", "SystemExit: 3"),
        ("import os\nos._exit(7)", "", "SystemExit: 7"),
        ("import os\nprint('x')\nos._exit(137)", "x\n", "SystemExit: 137"),
        ("import sys\nsys.exit('message')", "", "message"),
        ("def f(): return f()\nf()", "", "RecursionError: maximum recursion depth exceeded"),
        # Plain python would end itself by a signal, after the same traceback.
        ("raise KeyboardInterrupt", "", "KeyboardInterrupt"),
        ("int('1' * 5000)", "", "ValueError: Exceeds the limit (4300 digits)"),
    ],
)
def test_failures_keep_output_and_last_line(sandbox, code, stdout, error):
    result = run(sandbox, code)
    assert result.status == "error"
    assert result.stdout == stdout
    assert result.error.startswith(error) and "\n" not in result.error
    assert result_text(result) == result.error.strip()


def test_traceback_shows_the_programs_own_lines(sandbox):
    code = "import sys\nsys.stderr = sys.stdout\ndef f():\n    return 1 / 0  # here\nf()"
    lines = run(sandbox, code).stdout.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1:3] == ['  File "main.py", line 5, in <module>', "    f()"]
    assert "    return 1 / 0  # here" in lines
    assert not any("cir_jax" in line for line in lines)


def test_programs_share_nothing(sandbox):
    first = run(sandbox, "import math, os\nmath.pi = 3\nx = 1\nopen('f', 'w').close()\nos.getcwd()")
    assert first.status == "ok"
    for _ in range(3):
        result = run(sandbox, "import math, os\nprint(math.pi, 'x' in globals(), os.listdir('.'))")
        assert result.stdout == "3.141592653589793 False []\n"


def test_environment_is_cleared(other):
    assert os.environ["SECRET_TOKEN"] == "hidden-value"
    result = run(other, "import os\nprint(dict(os.environ), list(os.environb.values()))")
    assert "OPENBLAS_NUM_THREADS" in result.stdout
    assert "hidden-value" not in result.stdout


def test_same_seed_same_output_on_every_worker(sandbox, other):
    code = (
        "import os, random, numpy as np\n"
        "import sympy.core.random as r\n"
        "print(hash('a'), list({'x', 'y', 'z', 'w'}), random.random(), np.random.rand(),"
        " np.random.default_rng().random(), r.random(), id(np.linalg.solve), os.getpid())"
    )
    outputs = {run(s, code, seed=5).stdout for s in (sandbox, sandbox, other)}
    assert len(outputs) == 1 and outputs != {""}
    assert run(sandbox, code, seed=6).stdout not in outputs


def test_timeout_has_one_text_and_keeps_partial_output(sandbox):
    endless = sandbox.submit("print('partial')\nwhile True: pass")
    sleeping = sandbox.submit("import time\nprint('x' * 10)\ntime.sleep(100)")
    stubborn = sandbox.submit(
        "import signal\nfor s in range(1, 32):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    )
    results = [f.result(60) for f in (endless, sleeping, stubborn)]
    assert [r.status for r in results] == ["timeout"] * 3
    assert {result_text(r) for r in results} == {ERROR_TEXTS["timeout"]}
    assert [r.stdout for r in results] == ["partial\n", "x" * 10 + "\n", ""]
    assert all(LIMITS.timeout_s <= r.wall_s < LIMITS.timeout_s + 2 for r in results)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import ctypes\nctypes.string_at(0)", "crashed"),
        ("import os\nos.kill(os.getpid(), 9)", "crashed"),
        ("import os\nos.abort()", "crashed"),
        ("import os\nos.kill(0, 15)", "crashed"),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "oom"),
        ("import numpy as np\nnp.ones((10**6, 10**6))", "oom"),
    ],
)
def test_crash_and_memory(sandbox, code, status):
    restarts = sandbox.stats()["restarts"]
    result = run(sandbox, code)
    assert result.status == status
    assert result_text(result) == ERROR_TEXTS[status]
    assert sandbox.stats()["restarts"] == restarts


def test_output_floods_are_cut(sandbox):
    result = run(sandbox, "print('start')\nprint('x' * 10**6)\nprint('end')")
    assert result.status == "ok"
    assert result.stdout.startswith("start\nxxx") and result.stdout.endswith("xxx\nend\n")
    assert LIMITS.output_bytes < len(result.stdout) < LIMITS.output_bytes + 64
    endless = run(sandbox, "while True: print('y' * 10**5)")
    assert endless.status == "error" and "File too large" in endless.error
    stderr = run(sandbox, "import sys\nfor _ in range(100): sys.stderr.write('z' * 10**5)")
    assert (stderr.status, stderr.stdout) == ("ok", "")


def test_processes_are_refused_unless_allowed(sandbox, parallel):
    code = "import subprocess\nprint(subprocess.check_output(['echo', 'hi']))"
    assert run(sandbox, code).error.startswith("PermissionError")
    assert run(parallel, code).stdout == "b'hi\\n'\n"
    pool = (
        "from multiprocessing import Pool\ndef f(x): return x * x\n"
        "if __name__ == '__main__':\n    with Pool(2) as p: print(p.map(f, range(4)))"
    )
    assert run(parallel, pool).stdout == "[0, 1, 4, 9]\n"
    ended = (
        "import multiprocessing as m, time\np = m.Process(target=time.sleep, args=(9,))\n"
        "p.start(); time.sleep(.2); p.terminate(); p.join()\nprint(p.exitcode)"
    )
    assert run(parallel, ended).stdout == f"{-signal.SIGTERM}\n"


def test_what_a_program_leaves_is_gone(parallel):
    wait_for_spare(parallel, 2)
    before = num_processes(parallel)
    daemon = (
        "import os, time\nopen('left', 'w').close()\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        import signal\n        signal.signal(15, signal.SIG_IGN)\n"
        "        time.sleep(1000)\n    os._exit(0)\nprint('left')"
    )
    assert run(parallel, daemon).stdout == "left\n"
    assert num_processes(parallel) == before
    subprocess_daemon = (
        "import subprocess\n"
        "subprocess.Popen(['sleep', '1000'], start_new_session=True)\nprint('left')"
    )
    assert run(parallel, subprocess_daemon).stdout == "left\n"
    assert num_processes(parallel) == before


def test_fork_bomb_is_contained(parallel):
    wait_for_spare(parallel, 2)
    before = num_processes(parallel)
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    started = time.monotonic()
    future = parallel.submit(bomb)
    time.sleep(1.0)
    during = num_processes(parallel)
    assert future.result(60).status == "timeout"
    assert time.monotonic() - started < 10
    assert before < during <= before + LIMITS.num_tasks
    assert run(parallel, "print('alive')").stdout == "alive\n"
    assert num_processes(parallel) == before


def test_scratch_is_limited(sandbox):
    full = run(sandbox, "for i in range(10): open(f'f{i}', 'wb').write(bytes(10**7))")
    assert full.status == "error" and "No space left" in full.error
    assert run(sandbox, "open('f', 'wb').write(bytes(10**7))\nprint(1)").stdout == "1\n"


def test_file_size_is_limited(sandbox):
    result = run(sandbox, "open('f', 'wb').write(bytes(20 * 2**20))")
    assert result.status == "error" and "File too large" in result.error


def test_worker_killed_in_mid_program(other):
    wait_for_spare(other, 2)
    before = other.stats()
    futures = [other.submit(f"import time\ntime.sleep(0.3)\nprint({i})") for i in range(4)]
    time.sleep(0.15)
    os.kill(before["pids"][0], signal.SIGKILL)  # the first in the list gets work first
    assert [f.result(60).stdout for f in futures] == ["0\n", "1\n", "2\n", "3\n"]
    assert other.stats()["retries"] == before["retries"] + 1


def test_a_missing_interpreter_raises():
    with pytest.raises(SandboxError, match="/bin/false"):
        Sandbox(LIMITS, num_workers=1, interpreter="/bin/false")


@pytest.mark.parametrize("field", ["timeout_s", "memory_bytes", "num_tasks"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_limits_are_checked(field, value):
    with pytest.raises(ValueError, match=field):
        Limits(**{field: value})


def test_result_text():
    assert result_text(ExecResult("ok", "  a\n")) == "a"
    assert result_text(ExecResult("ok", "")) == ""
    assert result_text(ExecResult("ok", "x" * 400)) == "x" * 400
    long = "a" * 200 + "b" + "c" * 200
    assert result_text(ExecResult("ok", f"\n{long}\n")) == "a" * 200 + "..." + "c" * 200
    assert result_text(ExecResult("error", "printed", "ValueError: x")) == "ValueError: x"
    assert len(result_text(ExecResult("error", "", "ValueError: " + "x" * 999))) == 403
    texts = {result_text(ExecResult(s, "printed", "other")) for s in ERROR_TEXTS}
    assert texts == set(ERROR_TEXTS.values()) and len(texts) == 3
    with pytest.raises(ValueError, match="sandbox"):
        result_text(ExecResult("infra", "", "OSError"))


def test_result_text_of_other_recipes():
    prefix = "Code Execution Results:\n"
    cfg = ResultConfig(prefix=prefix, max_chars=7)
    assert text.result_text(ExecResult("ok", " 1\n"), cfg) == f"{prefix}1"
    assert text.result_text(ExecResult("ok", "1234567"), cfg) == f"{prefix}1234567"
    assert text.result_text(ExecResult("ok", "12345678"), cfg) == f"{prefix}123...678"
    assert text.result_text(ExecResult("error", "", "E: x"), cfg) == f"{prefix}E: x"
    # Half a character is none.
    assert text.result_text(ExecResult("ok", "12"), ResultConfig(max_chars=1)) == "..."
    with pytest.raises(ValueError, match="output block"):
        ResultConfig(prefix="```output")
