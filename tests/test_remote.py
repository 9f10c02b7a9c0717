"""The sandbox elsewhere: the same results as here, and services that fail in every way."""

import base64
import contextlib
import functools
import http.server
import json
import random
import socket
import threading
import time

import programs
import pytest

from cir_jax.cli import main
from cir_jax.config import SandboxConfig
from cir_jax.sandbox import guest, remote
from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.pool import Sandbox, open_sandbox
from cir_jax.sandbox.remote import RemoteSandbox
from cir_jax.sandbox.text import ERROR_TEXTS

LIMITS = Limits(timeout_s=2.0, memory_bytes=2**29, output_bytes=100_000)

# What SandboxFusion does with a script, in an environment of its own.
SERVICE = """\
import json, os, subprocess, sys
with open("script.py", "w", encoding="ascii") as file:
    file.write({code!r})
python = next(p for p in (sys.executable, "/run/python" + sys.executable) if os.path.exists(p))
env = {{"PYTHONHASHSEED": "123", "LANG": "C", "PATH": "/usr/bin"}}
done = subprocess.run(
    [python, "script.py"],
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    env=env,
    start_new_session=True,
)
print(json.dumps([done.returncode, done.stdout, done.stderr]))
"""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append((self.path, request))
        try:
            server.answer(self, request)
        except (ConnectionError, TimeoutError):
            pass  # hung up

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(answer):
    """A server on a free port; `answer(handler, request)` replies. Yields it, with `url`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.lock, server.requests = threading.Lock(), []
        server.answer = answer
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def command(status, return_code=None, stdout="", stderr=""):
    """An answer of SandboxFusion's."""
    run = {"status": status, "execution_time": 0.1, "return_code": return_code}
    return json.dumps(
        {
            "status": "Success" if return_code == 0 else "Failed",
            "message": "",
            "compile_result": None,
            "run_result": run | {"stdout": stdout, "stderr": stderr},
            "executor_pod_name": None,
            "files": {},
        }
    ).encode()


def said(printed="2\n", **changes):
    """What the script says of a program that went well."""
    encoded = base64.b64encode(printed.encode()).decode()
    told = {"exit_code": 0, "in_time": True, "wall_s": 0.5, "stdout": encoded, "stderr": ""}
    return json.dumps(told | changes)


WELL = command("Finished", 0, said())


def is_check(request):
    return "platform.python_version" in request["code"]


def in_turn(*answers):
    """Answers to programs, one after the other; the last of them goes on. Checks go well."""
    left = list(answers)
    lock = threading.Lock()

    def answer(handler, request):
        if is_check(request):
            handler.reply(200, WELL)
            return
        with lock:
            now = left.pop(0) if len(left) > 1 else left[0]
        if callable(now):
            now(handler)
        else:
            handler.reply(*now)

    return answer


@pytest.fixture
def quick(monkeypatch):
    """A remote sandbox that soon gives up: an answer has to come within half a second."""
    monkeypatch.setattr(remote, "_START_S", 0.1)
    limits = Limits(timeout_s=0.2)
    return functools.partial(
        RemoteSandbox, limits=limits, max_requests=2, grace_s=0.2, num_attempts=3, backoff_s=0.01
    )


def run(sandbox, code="1 + 1", **kwargs):
    return sandbox.submit(code, **kwargs).result(60)


# --- results


@pytest.fixture(scope="module")
def here():
    with Sandbox(LIMITS, num_workers=1) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def service():
    """A server that runs scripts in a sandbox."""
    limits = Limits(timeout_s=30, allow_processes=True)
    with Sandbox(limits, num_workers=1) as sandbox:

        def answer(handler, request):
            result = run(sandbox, SERVICE.format(code=request["code"]))
            assert result.status == "ok", result
            handler.reply(200, command("Finished", *json.loads(result.stdout)))

        with serving(answer) as server:
            yield server


@pytest.fixture(scope="module")
def there(service):
    with RemoteSandbox(service.url, LIMITS, max_requests=2) as sandbox:
        yield sandbox


SAME = {
    "value": "x = 3\nx ** 2",
    "nothing": "x = 5",
    "printed and value": "print('a')\n2",
    "raw output and value": "import os\n_ = os.write(1, b'raw')\n2",
    "order of sets": "print({'alpha', 'beta', 'gamma', 'delta'}, hash('x'))",
    "random numbers": "import random, numpy as np, sympy.core.random as r\n"
    "print(random.random(), np.random.rand(), np.random.default_rng().random(), r.random(),"
    " random.choices(range(99), k=5), np.random.permutation(9))",
    "sympy": "from sympy import *\nx, y = symbols('x y')\n"
    "solve([x + y - 3, x*y - 2]), {x, y}, factor(x**6 - 1)",
    "main module": "import pickle, sys\nclass A: pass\nif __name__ == '__main__':\n"
    "    print(type(pickle.loads(pickle.dumps(A()))) is A, sys.argv, sys.stdin.read())",
    "end": "import atexit, threading\natexit.register(print, 'end')\n"
    "threading.Timer(.05, print, ['late']).start()\nprint('start')",
    "text": "print('\\u00e9\\u4e2d\\U0001f600')\nprint('\u00e9\u4e2d'.encode())",
    "bytes that are no text": "import sys\nsys.stdout.buffer.write(b'x\\xff\\0y')",
    "environment": "import os\nprint(sorted(os.environ.items()))",
    "own source": "import inspect\ndef f(): return 1\nprint(inspect.getsource(f))",
    "error": "print('before')\ndef f(x):\n    return 1 / x\nf(0)",
    "chained error": "try:\n    {}['k']\nexcept KeyError as e:\n    raise ValueError('no') from e",
    "traceback": "import sys\nsys.stderr = sys.stdout\ndef f():\n    return 1 / 0  # here\nf()",
    "syntax error": "def f(:",
    "surrogates": "print('\\ud800')",
    "surrogate in the program": "x = '\ud800'",
    "input": "input()",
    "exit status": "import sys\nprint(1)\nsys.exit(3)",
    "exit message": "import sys\nsys.exit('message')",
    "signal": "import os\nos.kill(os.getpid(), 9)",
    "kill all": "import os\nos.kill(0, 15)",
    "memory": "x = []\nwhile True: x.append(bytearray(10**7))",
    "flood": "print('start')\nprint('x' * 10**6)\nprint('end')",
    "endless flood": "while True: print('y' * 10**5)",
    "out of time": "print('partial')\nwhile True: pass",
}


@pytest.mark.parametrize("name", SAME)
def test_same_result_as_here(here, there, name):
    ours, theirs = (run(sandbox, SAME[name], seed=7) for sandbox in (here, there))
    assert (theirs.status, theirs.stdout, theirs.error) == (ours.status, ours.stdout, ours.error)
    assert theirs.status != "infra" and 0 <= theirs.wall_s < LIMITS.timeout_s + 2


@pytest.mark.slow
def test_ordinary_programs_come_out_as_here(service):
    codes = [code for codes in programs.by_kind().values() for code in codes]
    limits = Limits(timeout_s=30, output_bytes=100_000)
    with Sandbox(limits, num_workers=1) as here:
        with RemoteSandbox(service.url, limits, max_requests=1) as there:
            pairs = [(code, here.submit(code), there.submit(code)) for code in codes]
            for code, ours, theirs in pairs:
                ours, theirs = ours.result(600), theirs.result(600)
                got = (theirs.status, theirs.stdout, theirs.error)
                assert got == (ours.status, ours.stdout, ours.error), code


def test_same_seed_same_numbers(there):
    code = "import random\nrandom.random()"
    assert run(there, code, seed=3).stdout == f"{random.Random(3).random()}\n"
    assert run(there, code, seed=4).stdout == f"{random.Random(4).random()}\n"


def test_a_program_that_ends_its_script_is_to_blame(there):
    retries = there.stats()["retries"]
    result = run(there, "import os\nos.kill(os.getppid(), 9)\nimport time\ntime.sleep(9)")
    assert (result.status, result.error) == ("crashed", ERROR_TEXTS["crashed"])
    assert there.stats()["retries"] == retries + 1
    assert run(there).stdout == "2\n"


def test_requests_and_stats(there, service):
    before = there.stats()
    assert run(there, "print('once')").stdout == "once\n"
    path, request = service.requests[-1]
    assert path == "/run_code" and request["language"] == "python"
    assert request["run_timeout"] > LIMITS.timeout_s and "once" in request["code"]
    after = there.stats()
    assert after["jobs"] == before["jobs"] + 1
    # Counted after the result is out.
    assert after["statuses"].get("ok", 0) - before["statuses"].get("ok", 0) in (0, 1)
    run(there)
    assert there.stats()["statuses"]["ok"] > before["statuses"].get("ok", 0)
    assert (after["rung"], after["url"]) == ("remote", service.url)
    assert "numpy" in after["versions"] and len(after["run_s"]) == 2


def test_scripts_are_ascii():
    code = remote.script("print('\u00e9\ud800')", 1, LIMITS)
    assert code.isascii()
    compile(code, "script.py", "exec")
    assert code.startswith(f'"""{guest.__doc__}')


def test_command_line_and_config(service, tmp_path, capsys):
    path = tmp_path / "program.py"
    path.write_text("print('at the service')\n1 / 0")
    assert main(["run", str(path), "--url", service.url]) == 1
    captured = capsys.readouterr()
    assert captured.out == "ZeroDivisionError: division by zero\n"
    assert "at the service" in service.requests[-1][1]["code"]
    with open_sandbox(SandboxConfig(url=service.url + "/", timeout_s=3.0)) as sandbox:
        assert run(sandbox, "5").stdout == "5\n"
        assert sandbox.limits.timeout_s == 3.0


@pytest.mark.parametrize(
    "url", ["localhost:8080", "ftp://h", "http://", "http://h:x", "http://u:p@h", "http://h/?q"]
)
def test_an_unusable_url_is_refused(url, capsys):
    with pytest.raises(ValueError, match="must be http://HOST:PORT"):
        SandboxConfig(url=url)
    with pytest.raises(SystemExit) as ended:
        main(["run", "x.py", "--url", url])
    assert ended.value.code == 2
    assert f"{url}: must be http://HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["", "/", "/run_code"])
def test_path_of_the_url(quick, path):
    with serving(in_turn((200, WELL))) as server:
        with quick(f"{server.url}/a/b{path}") as sandbox:
            assert run(sandbox).stdout == "2\n"
        assert {path for path, _ in server.requests} == {"/a/b/run_code"}


# --- faults


def hang(handler):
    time.sleep(3)


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def no_http(handler):
    handler.wfile.write(b"\xff\x00 garbage\r\n\r\n")


def cut_short(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(WELL)))
    handler.end_headers()
    handler.wfile.write(WELL[:-9])


def drip(handler):
    """Byte by byte, for ever: no single wait is long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.02)


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 2**16)


SERVICE_ERROR = json.dumps({"status": "SandboxError", "message": "no disk", "run_result": None})
# Each with a part of the reason that is given in the end.
FAULTS = {
    "500": ((500, b"Internal Server Error"), "HTTP status 500: Internal Server Error"),
    "429": ((429, b""), "HTTP status 429"),
    "hang": (hang, "no answer within 0.5 s"),
    "hang up": (hang_up, "RemoteDisconnected"),
    "no HTTP": (no_http, "BadStatusLine"),
    "cut short": (cut_short, "IncompleteRead"),
    "drip": (drip, "no answer within 0.5 s"),
    "drip in headers": (drip_headers, "no answer within 0.5 s"),
    "endless": (endless, "more than 4194304 bytes"),
    "huge": ((200, b'{"status": "' + b"x" * 2**22 + b'"}'), "more than 4194304 bytes"),
    "error of its own": ((200, SERVICE_ERROR.encode()), "SandboxError: no disk"),
    "empty": ((200, b""), "malformed"),
    "no JSON": ((200, b"<html>\xff"), "malformed"),
    "list": ((200, b"[]"), "malformed"),
    "deep": ((200, b"[" * 10**5), "malformed"),
    "no result": ((200, b'{"status": "Success", "run_result": null}'), "malformed"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_costs_nothing(quick, name):
    with serving(in_turn(FAULTS[name][0], (200, WELL))) as server, quick(server.url) as sandbox:
        result = run(sandbox)
        assert (result.status, result.stdout, result.wall_s) == ("ok", "2\n", 0.5)
        assert sandbox.stats()["retries"] == 1


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_the_services(quick, name):
    fault, reason = FAULTS[name]
    with serving(in_turn(fault)) as server, quick(server.url) as sandbox:
        started = time.monotonic()
        result = run(sandbox)
        # Three attempts of half a second at most, and pauses of 10 and 20 ms.
        assert time.monotonic() - started < 3
        assert result.status == "infra" and reason in result.error and "\n" not in result.error
        assert len(server.requests) == 1 + 3


@pytest.mark.parametrize("status", [301, 400, 404, 422])
def test_a_refusal_is_not_repeated(quick, status):
    with serving(in_turn((status, b"no"))) as server, quick(server.url) as sandbox:
        result = run(sandbox)
        assert (result.status, result.error) == ("infra", f"HTTP status {status}: no")
        assert len(server.requests) == 1 + 1


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (command("Finished", -9), "crashed"),
        (command("Finished", 137, "", "Killed"), "crashed"),
        (command("Finished", 1, "", "MemoryError"), "crashed"),
        (command("Error"), "crashed"),
        (command("TimeLimitExceeded"), "timeout"),
        (command("Finished", 0, "forged" + said()), "crashed"),
        (command("Finished", 0, "[]"), "crashed"),
        (command("Finished", 0, said(exit_code="0")), "crashed"),
        (command("Finished", 0, said(in_time=1)), "crashed"),
        (command("Finished", 0, said(wall_s=float("nan"))), "crashed"),
        (command("Finished", 0, said(wall_s=-1.0)), "crashed"),
        (command("Finished", 0, said(stderr="not base64!")), "crashed"),
        (command("Finished", 0, said(stdout=None)), "crashed"),
    ],
)
def test_a_lost_script_is_the_programs_fault_if_others_are_not_lost(quick, answer, status):
    with serving(in_turn((200, answer))) as server, quick(server.url) as sandbox:
        result = run(sandbox)
        assert (result.status, result.error) == (status, ERROR_TEXTS[status])
        # A check at the start, the program twice, and a check whether it was the program.
        assert [is_check(request) for _, request in server.requests] == [True, False, False, True]

    works = [True]

    def broken(handler, request):
        handler.reply(200, WELL if is_check(request) and works.pop() else answer)
        works.append(False)

    with serving(broken) as server, quick(server.url) as sandbox:
        result = run(sandbox)
        assert result.status == "infra" and "script" in result.error


def test_what_a_program_may_come_to(quick):
    error = base64.b64encode(b"Traceback\nValueError: x\n").decode()
    told = [
        ({"exit_code": 1, "stderr": error}, "error", "ValueError: x"),
        ({"exit_code": 3}, "error", "SystemExit: 3"),
        ({"exit_code": -11}, "crashed", ERROR_TEXTS["crashed"]),
        ({"exit_code": -9, "in_time": False}, "timeout", ERROR_TEXTS["timeout"]),
    ]
    answers = [(200, command("Finished", 0, said(**changes))) for changes, _, _ in told]
    with serving(in_turn(*answers)) as server, quick(server.url) as sandbox:
        for _, status, text in told:
            result = run(sandbox)
            assert (result.status, result.error, result.stdout) == (status, text, "2\n")


def test_a_service_that_is_not_there(quick):
    with serving(in_turn((200, WELL))) as server:
        sandbox = quick(server.url)
    with sandbox:
        result = run(sandbox)
        assert result.status == "infra" and "ConnectionRefusedError" in result.error
    with pytest.raises(SandboxError, match=f"sandbox.url='{server.url}': ConnectionRefused"):
        quick(server.url)


def test_a_service_without_the_libraries(quick):
    error = base64.b64encode(b"ModuleNotFoundError: No module named 'numpy'\n").decode()
    answer = command("Finished", 0, said("", exit_code=1, stderr=error))
    with serving(lambda handler, request: handler.reply(200, answer)) as server:
        with pytest.raises(SandboxError, match="No module named 'numpy'"):
            quick(server.url)
    answer = command("Finished", 127, "", "bash: python: command not found")
    with serving(lambda handler, request: handler.reply(200, answer)) as server:
        with pytest.raises(SandboxError, match="command not found"):
            quick(server.url)


def test_requests_in_flight_are_bounded(quick):
    active, most, lock = [], [], threading.Lock()

    def slow(handler):
        with lock:
            active.append(handler)
            most.append(len(active))
        time.sleep(0.1)
        with lock:
            active.remove(handler)  # before its reply, on which the next may come
        handler.reply(200, WELL)

    with serving(in_turn(slow)) as server, quick(server.url, max_requests=3) as sandbox:
        futures = [sandbox.submit("1") for _ in range(9)]
        assert [f.result(60).status for f in futures] == ["ok"] * 9
        assert max(most) == 3


def test_a_cancelled_program_is_not_sent(quick):
    with serving(in_turn(hang, (200, WELL))) as server:
        with quick(server.url, max_requests=1) as sandbox:
            first, second, third = (sandbox.submit(code) for code in "123")
            assert second.cancel()
            assert (first.result(60).status, third.result(60).status) == ("ok", "ok")
        assert len(server.requests) == 1 + 2 + 1


def test_closing_gives_up_what_is_under_way(quick):
    with serving(in_turn(hang)) as server:
        sandbox = quick(server.url, grace_s=100)
        futures = [sandbox.submit("1") for _ in range(5)]
        while len(server.requests) < 2:
            time.sleep(0.01)
        started = time.monotonic()
        sandbox.close()
        sandbox.close()
        assert time.monotonic() - started < 1
        for future in futures:
            with pytest.raises(RuntimeError, match="closed"):
                future.result(1)
        with pytest.raises(RuntimeError, match="closed"):
            sandbox.submit("1")
