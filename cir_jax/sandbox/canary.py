"""Attacks that every sandbox has to withstand before it takes its first program.

Each is a short program that says whether it was refused, and by which error. What it must not reach
is made for the purpose: a file and two listening sockets of this process's, a variable of its
environment. None does harm should it succeed: what is not made for it is opened and not written to,
set to what it is, or asked for in a way that only passes the check.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

from cir_jax.records import ExecResult
from cir_jax.sandbox.environment import ENVIRONMENT
from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.isolation import Rung
from cir_jax.sandbox.limits import Limits

Submit = Callable[[str], Future[ExecResult]]

_HELD = "held"
_NUM_TRIES = 5

# Runs one attack: prints "BROKEN" if it succeeds, "held" if it ends with an error that stands for a
# refusal. Any other end says nothing about the sandbox, and counts as broken, too.
_FRAME = """\
import ctypes, errno, fcntl, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
def refused():
    raise PermissionError(errno.EPERM, "refused")
def trainer():
    # In a process namespace the trainer's number may stand for the program or its worker.
    own = [os.getpid(), os.getppid()]
    if os.path.islink("/proc/self"):
        own.append(int(os.readlink("/proc/self")))
    if {pid} in own:
        raise ProcessLookupError(errno.ESRCH, "the trainer has no number here")
    return {pid}
def attack():
{body}
try:
    attack()
except (OSError, MemoryError) as error:
    number = getattr(error, "errno", errno.ENOMEM)
    if number not in {refusals}:
        raise
    print("held", errno.errorcode[number])
else:
    print("BROKEN")
"""
_REFUSALS = {errno.EPERM, errno.EACCES, errno.ENOENT, errno.ESRCH, errno.EROFS, errno.ENOSYS}
# Name -> body. {file}, {folder}, {port}, {name}, {socket} (a path) are the trainer's; {bytes}: over
# the limit; {variables}: what a program's environment may hold. trainer() is its process number.
_ATTACKS = {
    "trainer's environment": "    if set(os.environ) <= {variables!r}: refused()",
    "trainer's /proc entry": "    open(f'/proc/{{trainer()}}/environ', 'rb').read(1)",
    "trainer's file": "    open({file!r}).read()",
    "file beside it": "    open({folder!r} + '/new', 'w')",
    "rights of the file": "    os.chmod({file!r}, 0o666)",
    "owner of the file": "    os.chown({file!r}, -1, -1)",
    "times of the file": "    os.utime({file!r})",
    "attributes of the file": "    os.setxattr({file!r}, 'user.canary', b'')",
    "length of the file": "    os.truncate({file!r}, 0)",
    "cutting the file as it is opened": "    os.open({file!r}, 3 | os.O_TRUNC)",
    "host's passwords": "    open('/etc/shadow').read()",
    "change of /usr": "    os.chmod('/usr', os.stat('/usr').st_mode & 0o7777)",
    "write to the interpreter's library": "    os.open(os.__file__, os.O_WRONLY)",
    "rights of the interpreter's library": (
        "    os.chmod(os.open(os.__file__, os.O_RDONLY), os.stat(os.__file__).st_mode & 0o7777)"
    ),
    # The node would be another /dev/null.
    "device": (
        "    folder = {folder!r} if os.path.isdir({folder!r}) else '/tmp'\n"
        "    os.mknod(folder + '/device', 0o20666, os.makedev(1, 3))"
    ),
    "trainer's TCP port": "    socket.create_connection(('127.0.0.1', {port}), 1)",
    "metadata server": "    socket.create_connection(('169.254.169.254', 80), 1)",
    "trainer's abstract socket": "    socket.socket(socket.AF_UNIX).connect('\\0' + {name!r})",
    "datagram to the trainer's socket": (
        "    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "    a.sendto(b'reached', {socket!r})"
    ),
    "vsock": "    socket.socket(40, socket.SOCK_STREAM)",
    "signal to the trainer": "    os.kill(trainer(), 0)",
    "signal to everybody else": "    os.kill(-1, 0)",
    "signal by a descriptor": "    fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getpid())",
    "choice of that signal": "    fcntl.fcntl(os.pipe()[0], fcntl.F_SETSIG, 0)",
    "signal by a socket": (
        "    fcntl.ioctl(socket.socketpair()[0], 0x8901, os.getpid().to_bytes(4, 'little'))"
    ),
    # Of a user whom nobody is: without the filter the answer is that there is none.
    "priority of a user's processes": "    os.setpriority(os.PRIO_USER, 2**31 - 1, 19)",
    # PTRACE_SEIZE of the worker, or PTRACE_TRACEME where the program does not see it.
    "tracing": (
        "    parent = os.getppid()\n"
        "    call(libc.ptrace(0x4206, parent, 0, 0) if parent else libc.ptrace(0, 0, 0, 0))"
    ),
    "user namespace": "    call(libc.unshare(0x10000000))",
    # Of a file system that does not exist: with the right to mount, the answer is that.
    "mount": "    call(libc.mount(b'none', b'/tmp', b'canary', 0, None))",
    "becoming root": "    os.setuid(0)",
    "terminal input": "    fcntl.ioctl(0, 0x5412, b'x')",
    "inherited descriptor": (
        "    for fd in range(3, 1024):\n"
        "        try: os.fstat(fd)\n"
        "        except OSError: continue\n"
        "        return\n"
        "    refused()"
    ),
    "more memory than allowed": "    bytearray({bytes})",
    "more scratch than allowed": (
        "    names = [f'/tmp/canary_{{i}}' for i in range({num_files})]\n"
        "    try:\n"
        "        for name in names:\n"
        "            with open(name, 'xb') as file: file.write(bytes({file_bytes}))\n"
        "    finally:\n"
        "        for name in names:\n"
        "            if os.path.exists(name): os.remove(name)"
    ),
    "kernel's settings": "    os.open('/proc/sys/kernel/core_pattern', os.O_WRONLY)",
    "being spared if memory runs out": "    os.open('/proc/self/oom_score_adj', os.O_WRONLY)",
}
_OWN_REFUSALS = {
    "priority of a user's processes": {errno.EPERM},
    "more memory than allowed": {errno.ENOMEM},
    "more scratch than allowed": {errno.ENOSPC, errno.EACCES},
    # Not EROFS: /proc is read-only, and only whom the file's own rights admit gets to hear of that.
    # It would be the host's root.
    "kernel's settings": {errno.EPERM, errno.EACCES, errno.ENOENT},
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
    """Runs all attacks that the rung has to withstand; `submit` runs a program in the sandbox."""
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
        programs = {name: _program(name, body, targets) for name, body in attacks.items()}
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


def _program(name: str, body: str, targets: dict[str, object]) -> str:
    refusals = _OWN_REFUSALS.get(name, _REFUSALS)
    return _FRAME.format(body=body.format(**targets), pid=targets["pid"], refusals=refusals)


def _is_late(result: ExecResult) -> bool:
    return result.status == "timeout"


def _judge(name: str, result: ExecResult) -> Outcome:
    said = result.stdout.strip() or f"{result.status}: {result.error}"
    # An attack that ended in any other way has not shown that it was refused.
    return Outcome(name, result.status == "ok" and said.startswith(_HELD), said)


_FOLDERS = "cir_jax_canary_"


@contextlib.contextmanager
def _open_folder() -> Iterator[str]:
    """A directory that every user of the machine may write to. Those of processes that were killed
    meanwhile are removed."""
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{_FOLDERS}*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left)
    made = Path(tempfile.mkdtemp(prefix=f".{_FOLDERS}"))
    folder = parent / made.name[1:]
    with _locked(made):
        # Found by others only now that it is seen to be in use.
        made.rename(folder)
        try:
            folder.chmod(0o777)
            yield str(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """BlockingIOError if another process holds it; the kernel lets go of it when that ends."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _targets() -> Iterator[dict[str, object]]:
    """What must stay out of reach, open to every user of the machine."""
    name = f"CIR_JAX_CANARY_{secrets.token_hex(8)}"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_open_folder())
        path = os.path.join(folder, "file")
        with open(path, "w") as file:
            file.write("reached")
        os.chmod(path, 0o666)
        mailbox = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        mailbox.bind(os.path.join(folder, "socket"))
        os.chmod(mailbox.getsockname(), 0o666)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind("\0" + name)
        abstract.listen(1)
        yield {
            "file": path,
            "folder": folder,
            "socket": mailbox.getsockname(),
            "port": server.getsockname()[1],
            "pid": os.getpid(),
            "name": name,
        }
