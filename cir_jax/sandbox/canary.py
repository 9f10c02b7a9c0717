"""Attacks that every sandbox has to withstand before it takes its first program.

Each is a short program that prints what it got hold of. What it must not reach is made for the
purpose: a file and a listening socket of this process's, a variable of its environment.
"""

import contextlib
import dataclasses
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from cir_jax.records import ExecResult
from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.isolation import Rung
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.probe import ENVIRONMENT

Submit = Callable[[str], Future[ExecResult]]

_HELD = "held"
_NUM_TRIES = 5

# Runs one attack: prints "BROKEN" if it succeeds, "held" if the system refuses it.
_FRAME = """\
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
def attack():
{body}
try:
    attack()
except (OSError, MemoryError) as error:
    print("held", type(error).__name__)
else:
    print("BROKEN")
"""
# Name -> body. {file}, {folder}, {port}, {pid}, {name} are the trainer's; {bytes}: over the limit;
# {variables}: what a program's environment may hold.
_ATTACKS = {
    "trainer's environment": "    if set(os.environ) <= {variables!r}: raise OSError",
    "trainer's /proc entry": "    open('/proc/{pid}/environ', 'rb').read(1)",
    "file in the trainer's folder": "    open({file!r}).read()",
    "write beside it": "    open({folder!r} + '/new', 'w')",
    "host's passwords": "    open('/etc/shadow').read()",
    "write to /usr": "    open('/usr/canary', 'w')",
    "disk device": "    os.mknod('/tmp/disk', 0o60600, os.makedev(8, 0))",
    "trainer's TCP port": "    socket.create_connection(('127.0.0.1', {port}), 1)",
    "metadata server": "    socket.create_connection(('169.254.169.254', 80), 1)",
    "trainer's abstract socket": "    socket.socket(socket.AF_UNIX).connect('\\0' + {name!r})",
    "vsock": "    socket.socket(40, socket.SOCK_STREAM)",
    "signal to the trainer": "    os.kill({pid}, 0)",
    "signal to everybody else": "    os.kill(-1, 0)",
    "trace of the parent": "    call(libc.ptrace(16, os.getppid() or 1, 0, 0))",
    "user namespace": "    call(libc.unshare(0x10000000))",
    "mount": "    call(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
    "becoming root": "    os.setuid(0)",
    "terminal input": "    import fcntl\n    fcntl.ioctl(0, 0x5412, b'x')",
    "inherited descriptor": (
        "    for fd in range(3, 1024):\n"
        "        try: os.fstat(fd)\n"
        "        except OSError: continue\n"
        "        return\n"
        "    raise OSError"
    ),
    "more memory than allowed": "    bytearray({bytes})",
    "more scratch than allowed": (
        "    for i in range({num_files}):\n"
        "        with open(f'/tmp/{{i}}', 'wb') as file: file.write(bytes({file_bytes}))"
    ),
    "kernel's settings": "    open('/proc/sys/kernel/core_pattern', 'r+').write('x')",
}
_PROCESSES = {"new process": "    if os.fork() == 0: os._exit(0)"}
# What a machine without namespaces cannot hide or keep apart.
_NAMESPACES_ONLY = {"existence of the trainer's file": "    os.stat({file!r})"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    name: str
    held: bool
    said: str
    """What the attack said, or how it ended."""


def attack(submit: Submit, limits: Limits, rung: Rung) -> list[Outcome]:
    """Runs all attacks that the rung has to withstand; `submit` is the sandbox's."""
    attacks = dict(_ATTACKS)
    if not limits.allow_processes:
        attacks |= _PROCESSES
    if rung != "landlock":
        attacks |= _NAMESPACES_ONLY
    with _targets() as targets:
        targets |= {
            "variables": set(ENVIRONMENT),
            "bytes": limits.memory_bytes,
            "file_bytes": min(limits.file_bytes, limits.scratch_bytes),
            "num_files": limits.scratch_bytes // min(limits.file_bytes, limits.scratch_bytes) + 1,
        }
        programs = {
            name: _FRAME.format(body=body.format(**targets)) for name, body in attacks.items()
        }
        results: dict[str, ExecResult] = {}
        # On a busy machine a short time limit may strike; that is no verdict on the attack.
        for _ in range(_NUM_TRIES):
            late = [name for name in programs if name not in results or _is_late(results[name])]
            futures = {name: submit(programs[name]) for name in late}
            results |= {name: future.result() for name, future in futures.items()}
    return [_judge(name, results[name]) for name in programs]


def check(submit: Submit, limits: Limits, rung: Rung) -> None:
    """Raises SandboxError unless all attacks fail."""
    if broken := [outcome for outcome in attack(submit, limits, rung) if not outcome.held]:
        texts = "; ".join(f"{outcome.name} ({outcome.said})" for outcome in broken)
        raise SandboxError(f"the sandbox does not hold on rung {rung}: {texts}")


def _is_late(result: ExecResult) -> bool:
    return result.status == "timeout"


def _judge(name: str, result: ExecResult) -> Outcome:
    said = result.stdout.strip() or f"{result.status}: {result.error}"
    # An attack that ended in any other way has not shown that it was refused.
    return Outcome(name, result.status == "ok" and said.startswith(_HELD), said)


@contextlib.contextmanager
def _targets() -> Iterator[dict[str, object]]:
    """What must stay out of reach, open to every user of the machine."""
    name = f"CIR_JAX_CANARY_{secrets.token_hex(8)}"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.chmod(folder, 0o777)
        path = os.path.join(folder, "file")
        with open(path, "w") as file:
            file.write("reached")
        os.chmod(path, 0o666)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind("\0" + name)
        abstract.listen(1)
        yield {
            "file": path,
            "folder": folder,
            "port": server.getsockname()[1],
            "pid": os.getpid(),
            "name": name,
        }
