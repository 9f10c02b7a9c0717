"""Which rung of isolation this machine allows, found by trying, before any worker is started."""

import json
import logging
import os
import subprocess
import sys
import traceback
from typing import Any, NoReturn, get_args

from cir_jax.sandbox import isolation, linux, runtime, seccomp
from cir_jax.sandbox.environment import ENVIRONMENT
from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.isolation import Rung
from cir_jax.sandbox.limits import Limits

logger = logging.getLogger(__name__)

_TIMEOUT_S = 20.0
_PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); import cir_jax.sandbox.probe as p; p.main()"

_CURE = """\
Programs written by a model are not run without isolation. To allow it, one of:
- a container: start it with --privileged, or with --security-opt seccomp=unconfined
  --security-opt apparmor=unconfined (--cap-add SYS_ADMIN if it runs as root);
- user namespaces switched off: sysctl -w user.max_user_namespaces=15000, on Debian also
  kernel.unprivileged_userns_clone=1, on Ubuntu from 24.04 on also
  kernel.apparmor_restrict_unprivileged_userns=0; or start the trainer as root;
- sandbox.isolation=landlock: weaker; what it leaves open is in cir_jax/sandbox/landlock.py."""


def choose_rung(wanted: Rung, interpreter: str) -> Rung:
    """The wanted rung; for "namespaces" also "namespaces-flat", with a warning.

    Raises:
      SandboxError: the machine does not allow it; the message says why and what to do.
    """
    if wanted not in get_args(Rung):
        raise ValueError(f"isolation must be one of {get_args(Rung)}, got {wanted!r}")
    outcomes = try_rungs(interpreter)
    rungs = ("namespaces", "namespaces-flat") if wanted == "namespaces" else (wanted,)
    for rung in rungs:
        if outcomes[rung] == "":
            if rung != wanted:
                logger.warning(
                    "programs share their worker's namespaces, one after the other, because: %s",
                    outcomes[wanted],
                )
            return rung
    reasons = "".join(f"\n  {rung}: {outcomes[rung]}" for rung in rungs)
    raise SandboxError(f"no isolation for programs on this machine:{reasons}\n{_CURE}")


def try_rungs(interpreter: str = sys.executable) -> dict[str, str]:
    """Rung -> why it does not work here; "" if it does."""
    try:
        done = subprocess.run(
            [interpreter, "-P", "-c", _BOOT, _PACKAGE_PARENT],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            cwd="/",
        )
        outcomes: dict[str, Any] = json.loads(done.stdout)
        return {rung: str(outcomes[rung]) for rung in get_args(Rung)}
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(f"could not try isolation with {interpreter}: {error}") from None
    except (ValueError, KeyError):
        said = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        raise SandboxError(f"could not try isolation with {interpreter}: {said}") from None


def main() -> None:
    """Prints `try_rungs` of this interpreter as JSON."""
    print(json.dumps({rung: _in_child(rung) for rung in get_args(Rung)}))


def _in_child(rung: Rung) -> str:
    """Tries a rung in a process that can be spoilt by it."""
    if not seccomp.supported():
        return f"no filter of system calls for machines of type {os.uname().machine}"
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _try(rung, writer)
    os.close(writer)
    with open(reader) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return "" if said == "works" else said or "a process ended without a word"


def _try(rung: Rung, writer: int) -> None:
    said = "works"
    try:
        libraries = runtime.find()
        worker = isolation.enter(
            rung, Limits(), libraries, lambda child, _: _wait_for(child, writer)
        )
        worker.set_limits()
        # The first leaves the worker able to make another.
        for _ in range(2):
            if not _run_program(worker, writer):
                said = ""  # the program's process has said why
                break
    except (OSError, ImportError, KeyError) as error:
        said = str(error)
    except BaseException:
        said = traceback.format_exc()
    os.write(writer, said.encode())
    os._exit(0)


def _wait_for(child: int, writer: int) -> NoReturn:
    os.close(writer)
    os.waitpid(child, 0)
    os._exit(0)


def _run_program(worker: isolation.Isolation, writer: int) -> bool:
    """Whether a process for a program can be had."""
    pid = worker.fork()
    if pid == 0:
        try:
            worker.confine()
        except OSError as error:
            os.write(writer, str(error).encode())
            os._exit(1)
        os._exit(0)
    end = linux.End()
    worker.wait(pid, end)
    return linux.End.parse(end.memory)[0] == 0


def describe() -> dict[str, str]:
    """What of the machine decides about the rungs, for people to read."""
    facts = {
        "kernel": f"{os.uname().release} ({os.uname().machine})",
        "user": f"{os.geteuid()}" + (" (root)" if os.geteuid() == 0 else ""),
        "landlock": f"version {linux.landlock_version()}",
        "bubblewrap": "not needed",
        "cgroups": "not used; version "
        + ("2" if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else "1 or none"),
    }
    for name, path in (
        ("user namespaces", "/proc/sys/user/max_user_namespaces"),
        ("unprivileged user namespaces", "/proc/sys/kernel/unprivileged_userns_clone"),
        ("AppArmor restricts them", "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
        ("AppArmor profile", "/proc/self/attr/current"),
    ):
        try:
            with open(path) as file:
                facts[name] = file.read().strip("\0\n ")
        except OSError:
            facts[name] = "not there"
    return facts
