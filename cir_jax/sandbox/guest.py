"""What a remote service gets to run: a supervisor, and below it the program, as here.

The text of this module is the beginning of each script that is sent (see remote.py), so it uses
the standard library alone. The service starts the script, and that starts itself a second time:
with the environment that programs have here (the order of sets depends on it), and with files in
the place of pipes, so that the end of a long output is kept, and what was printed before the
deadline. The last thing that the supervisor does is to say, as JSON on its stdout:

    exit_code: the program's; negative for a signal
    in_time: whether it ended before its deadline
    wall_s: seconds since its interpreter was started, imports of libraries included
    stdout, stderr: base64 of what is kept of them
"""

import importlib.machinery
import os
import resource
import sys
import types

_RUN = "run"
_STDERR_BYTES = 2**16


def main(program: str, code: bytes, job: dict) -> None:
    """Args:
    program: the text of program.py.
    code: the program.
    job: "seed"; "env", the program's environment; "timeout_s", "memory_bytes", "file_bytes",
      "output_bytes" as in Limits.
    """
    if sys.argv[1:] == [_RUN]:
        _run(program, code, job)
    else:
        _supervise(job)


def _supervise(job: dict) -> None:
    import base64
    import json
    import signal
    import subprocess
    import tempfile
    import time

    late = []
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        started = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, os.path.abspath(sys.argv[0]), _RUN],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=job["env"],
        )

        def end(*_) -> None:
            late.append(True)
            child.send_signal(signal.SIGKILL)

        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, job["timeout_s"])
        exit_code = child.wait()
        signal.setitimer(signal.ITIMER_REAL, 0)
        said = {
            "exit_code": exit_code,
            "in_time": not late,
            "wall_s": time.monotonic() - started,
            "stdout": base64.b64encode(_ends(stdout.fileno(), job["output_bytes"])).decode(),
            "stderr": base64.b64encode(_end(stderr.fileno(), _STDERR_BYTES)).decode(),
        }
    print(json.dumps(said))


def _ends(fd: int, limit: int) -> bytes:
    """What a file holds; of more than `limit` bytes the beginning and the end."""
    size = os.fstat(fd).st_size
    if size <= limit:
        return os.pread(fd, size, 0)
    head, tail = limit - limit // 2, limit // 2
    cut = b"\n... %d bytes cut ...\n" % (size - limit)
    return os.pread(fd, head, 0) + cut + os.pread(fd, tail, size - tail)


def _end(fd: int, limit: int) -> bytes:
    size = os.fstat(fd).st_size
    return os.pread(fd, limit, max(0, size - limit))


def _run(text: str, code: bytes, job: dict) -> None:
    program = types.ModuleType("program")
    exec(compile(text, "program.py", "exec"), program.__dict__)
    cpu_s = int(job["timeout_s"]) + 3
    for kind, value in (
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_FSIZE, job["file_bytes"]),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    del sys.path[0]  # the script's folder
    program.settle(os.getcwd())
    sys.meta_path.insert(0, _SeedOnImport(program.SEEDERS, job["seed"]))
    program.run(code)


class _SeedOnImport:
    """Has modules with random numbers seeded as soon as they are loaded.

    To load them for it, as workers do once, would take longer than most programs run.
    """

    def __init__(self, seeders: dict, number: int):
        self._number = number
        self._seeders = dict(seeders)
        for name in [name for name in seeders if name in sys.modules]:
            self._seeders.pop(name)(sys.modules[name], number)

    def find_spec(self, name, path=None, target=None):
        seeder = self._seeders.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if seeder else None
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_seed(module) -> None:
                load(module)
                seeder(module, self._number)

            spec.loader.exec_module = load_and_seed
        return spec
