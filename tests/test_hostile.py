"""The hostile programs on each rung, as each user, and where isolation is forbidden."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import hostile
import numpy
import pytest

from cir_jax.sandbox import canary, probe
from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.pool import Sandbox

ROOT = Path(__file__).parent.parent
UNPRIVILEGED = 23456

# Run first in a process, it makes these calls fail as the default filters of containers do.
FORBIDDING = """
import errno, os, struct
from cir_jax.sandbox import linux, seccomp
names = {names}
code = [(0x20, 0, 0, 0)]  # load the call's number
for name in names:
    number = seccomp.numbers(os.uname().machine)[name]
    # If it is this call and its first argument has the flag (if any): EPERM.
    flag = [(0x20, 0, 0, 16), (0x45, 0, 1, {flag})] if {flag} else []
    code += [(0x15, 0, len(flag) + 1, number), *flag, (0x06, 0, 0, 0x50000 | errno.EPERM)]
    code += [(0x20, 0, 0, 0)]
code += [(0x06, 0, 0, 0x7FFF0000)]
linux.set_no_new_privileges()
linux.Filter(b"".join(struct.pack("<HBBI", *line) for line in code)).install()
"""
NAMESPACE_CALLS = ["unshare", "setns", "mount"]


@pytest.fixture(scope="module")
def public_python():
    """Runs python code or a script as an unprivileged user, with the same libraries."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv to become another user")
    # Not pytest's own folder, which each of its sessions closes to others as it starts.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        site = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        libraries = Path(numpy.__file__).parents[1]
        command = [f"--reuid={UNPRIVILEGED}", f"--regid={UNPRIVILEGED}", "--clear-groups"]
        for base in (sys.executable, f"/usr/bin/{name}"):
            if not os.path.exists(base):
                continue
            venv = folder / Path(base).parts[1]
            subprocess.run([base, "-m", "venv", "--without-pip", venv], check=True)
            (venv / site / "libraries.pth").write_text(f"{libraries}\n")
            prefix = ["setpriv", *command, venv / "bin/python"]
            # Started by that user itself, as the sandbox's workers are.
            code = "import subprocess as s, sys; s.run([sys.executable, '-c', 'import sympy'])"
            code += ".check_returncode()"
            if subprocess.run([*prefix, "-c", code], capture_output=True).returncode == 0:
                yield prefix
                return
        pytest.skip("no interpreter that other users can read, of this version, with the libraries")


def execute(prefix, *args, timeout_s=300):
    env = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    return subprocess.run(
        [*prefix, *args], cwd="/", env=env, capture_output=True, text=True, timeout=timeout_s
    )


def run_suite(prefix, rung, num_workers, num_endless):
    done = execute(prefix, ROOT / "tests/hostile.py", rung, str(num_workers), str(num_endless))
    if "no isolation for programs" in done.stderr:
        pytest.skip(f"{rung}: {done.stderr.splitlines()[-2]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_suite_is_large():
    cases = hostile.cases()
    assert len(cases) >= 120
    assert len({case.kind for case in cases}) >= 10


def test_suite_finds_faults():
    """No case takes what an attack that got through looks like, or a sandbox that fails."""
    reached = hostile.ExecResult("ok", "REACHED\n")
    odd = hostile.ExecResult("error", error="OddError: not the one")
    infra = hostile.ExecResult("infra", error="OSError")
    for case in hostile.cases():
        assert case.fault(infra), case
        assert case.fault(reached) or case.fault(odd), case
        if case.text:
            assert case.fault(reached) and case.fault(odd), case
        # What has to be refused is refused by a system call's error, not by another program's end.
        if "REACHED" in case.code and case.status == "ok":
            assert case.fault(hostile.ExecResult("ok", "refused EINVAL [Errno 22]\n"))
    filtered = [case for case in hostile.cases() if case.kind == "kernel"]
    assert len(filtered) >= 40
    for case in filtered:
        assert case.fault(hostile.ExecResult("ok", "refused EFAULT [Errno 14]\n")), case
        assert not case.fault(hostile.ExecResult("ok", "refused EPERM [Errno 1]\n")), case


@pytest.mark.parametrize("rung", ["namespaces", "namespaces-flat", "landlock"])
def test_own_user(rung):
    try:
        sandbox = Sandbox(hostile.LIMITS, num_workers=2, isolation=rung)
    except SandboxError as error:
        pytest.skip(str(error))
    with sandbox:
        assert hostile.run(sandbox, num_endless=6 if rung == "namespaces" else 2) == []


@pytest.mark.parametrize("rung", ["namespaces", pytest.param("landlock", marks=pytest.mark.slow)])
def test_unprivileged_user(public_python, rung):
    report = run_suite(public_python, rung, num_workers=1, num_endless=1)
    assert report["faults"] == [] and report["user"] == UNPRIVILEGED


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("rung", ["namespaces", "namespaces-flat", "landlock"])
def test_whole_suite_twice(public_python, rung, num_workers):
    for _ in range(2):
        for prefix in ([sys.executable], public_python):
            assert run_suite(prefix, rung, num_workers, num_endless=100)["faults"] == []


def forbidden(names, code, only_flag=0):
    script = FORBIDDING.format(names=names, flag=only_flag) + code
    return execute([sys.executable], "-c", script)


START = "from cir_jax.sandbox.pool import Sandbox\nSandbox(num_workers=1)\n"


def test_refuses_where_namespaces_are_forbidden():
    code = (
        "import time\nfrom cir_jax.sandbox.pool import Sandbox\n"
        "started = time.monotonic()\n"
        "try: Sandbox(num_workers=1)\n"
        "finally: print(time.monotonic() - started)\n"
    )
    done = forbidden(NAMESPACE_CALLS, code)
    assert done.returncode == 1
    assert "namespaces: " in done.stderr and "Operation not permitted" in done.stderr
    assert "sandbox.isolation=landlock" in done.stderr  # the cure
    assert float(done.stdout) < 2


def test_root_without_user_namespaces():
    """Root may make all others itself; its programs then share them, one after the other."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    code = (
        "import os\nfrom cir_jax.sandbox.pool import Sandbox\n"
        "with Sandbox(num_workers=1) as s:\n"
        "    print(s.rung, s.submit('import os\\nos.getuid() != 0').result().stdout)\n"
    )
    done = forbidden(["unshare"], code, only_flag=0x10000000)
    assert done.stdout == "namespaces-flat True\n\n", done.stderr
    assert "share their worker's namespaces" in done.stderr


def test_root_of_a_container_with_one_user(public_python):
    """It cannot become another user. It may be the host's root all the same: then none starts."""
    *user, python = public_python
    container = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*user, *container, "true"], capture_output=True).returncode:
        pytest.skip("cannot make such a container here")
    code = (
        "import os\nfrom cir_jax.sandbox.pool import Sandbox\nassert os.getuid() == 0\n"
        "with Sandbox(num_workers=1) as s:\n"
        "    print(s.rung, s.submit('import os\\nos.getuid()').result().stdout)\n"
    )
    done = execute([*user, *container, python], "-c", code)
    assert done.stdout == "namespaces 1000\n\n", done.stderr
    done = execute([*container, sys.executable], "-c", START)
    assert "the sandbox does not hold" in done.stderr and "kernel's settings (" in done.stderr


PID_1 = ["unshare", "--pid", "--fork", "--mount-proc"]


@pytest.mark.parametrize("rung", ["namespaces", "namespaces-flat", "landlock"])
def test_a_trainer_that_is_process_1(rung):
    """As in a container: elsewhere, 1 is the number of a program or its worker."""
    if subprocess.run([*PID_1, "true"], capture_output=True).returncode:
        pytest.skip("cannot make a process namespace here")
    code = (
        "import os\nfrom cir_jax.sandbox.pool import Sandbox\nassert os.getpid() == 1\n"
        f"with Sandbox(num_workers=1, isolation={rung!r}) as s:\n"
        "    print(s.submit('6 * 7').result().stdout)\n"
    )
    done = execute([*PID_1, sys.executable], "-c", code)
    if "no isolation for programs" in done.stderr:
        pytest.skip(f"{rung}: {done.stderr.splitlines()[-2]}")
    assert done.stdout == "42\n\n", done.stderr


@pytest.mark.parametrize("rung", ["namespaces", "namespaces-flat"])
def test_a_trainer_with_a_programs_number(rung):
    """Programs' numbers stay the same, or count up and so come by the trainer's."""
    try:
        sandbox = Sandbox(hostile.LIMITS, num_workers=1, isolation=rung, attack=False)
    except SandboxError as error:
        pytest.skip(str(error))
    names = ("signal to the trainer", "trainer's /proc entry")
    bodies = {name: canary._ATTACKS[name] for name in names}
    with sandbox:
        number = "import os\nprint(os.readlink('/proc/self'))"
        for name, body in bodies.items():
            first = int(sandbox.submit(number).result(60).stdout)
            # The second and third of them are met by the way, even if a program runs twice.
            pids = [first] + [first + 6] * 8 + [first + 14] * 8
            programs = [canary._program(name, body, {"pid": pid}) + number for pid in pids]
            results = [sandbox.submit(program).result(60) for program in programs]
            assert all(result.stdout.startswith("held ") for result in results), results
            own = [int(result.stdout.split()[-1]) for result in results]
            assert any(pid == own_pid for pid, own_pid in zip(pids, own, strict=True))


@pytest.mark.parametrize("user", ["own", "unprivileged"])
def test_landlock_has_to_be_asked_for(user, request):
    """Root's programs get by, too, if others may not enter the folders of its interpreter."""
    prefix = [sys.executable] if user == "own" else request.getfixturevalue("public_python")
    code = (
        "from cir_jax.sandbox.pool import Sandbox\n"
        "with Sandbox(num_workers=1, isolation='landlock') as s:\n"
        "    print(s.rung, s.submit('1 + 1').result().stdout)\n"
    )
    script = FORBIDDING.format(names=NAMESPACE_CALLS, flag=0) + code
    done = execute(prefix, "-c", script)
    assert done.stdout == "landlock 2\n\n", done.stderr


def test_the_trainers_threads_are_not_the_programs(public_python):
    """They have the same user there, and start in numbers after the workers do."""
    code = (
        "import threading\nfrom cir_jax.sandbox.pool import Sandbox\n"
        "with Sandbox(num_workers=1, isolation='landlock', attack=False) as s:\n"
        "    s.wait_until_ready()\n"
        "    stop = threading.Event()\n"
        "    for _ in range(200): threading.Thread(target=stop.wait, daemon=True).start()\n"
        "    code = 'import threading\\nthreading.Thread(target=print, args=(7,)).start()'\n"
        "    print(s.submit(code).result(), s.stats()['retries'])\n"
    )
    done = execute(public_python, "-c", code)
    assert "status='ok', stdout='7\\n'" in done.stdout and done.stdout.endswith(" 0\n"), done


# Isolates itself as a worker does, under an old version of Landlock's interface, and then runs the
# canaries' attacks on a file of its own user's.
OLD_LANDLOCK = """
import os, sys
from cir_jax.sandbox import canary, isolation, linux, runtime
from cir_jax.sandbox.limits import Limits
linux.landlock_version = lambda: {version}
limits = Limits()
libraries = runtime.find()

def stay_outside(child, _):
    os.waitpid(child, 0)
    os._exit(0)

with canary._targets() as targets:
    names = [name for name in canary._ATTACKS if "the file" in name or "signal" in name]
    programs = [canary._program(n, canary._ATTACKS[n], targets) for n in names]
    reader, writer = os.pipe()
    if os.fork() == 0:
        worker = isolation.enter("landlock", limits, libraries, stay_outside)
        worker.set_limits()
        for name, program in zip(names, programs):
            pid = worker.fork()
            if pid == 0:
                worker.confine()
                try: exec(program, {{}})
                except BaseException as error: print(name, repr(error))
                sys.stdout.flush()
                os._exit(0)
            os.waitpid(pid, 0)
        os._exit(0)
    os.wait()
    print(len(names), open(targets["file"]).read())
"""


@pytest.mark.parametrize("version", [1, 2, 3])
def test_old_versions_of_landlock(public_python, version):
    """What they do not cover, the filter does: on them the trainer's files are in sight."""
    done = execute(public_python, "-c", OLD_LANDLOCK.format(version=version))
    *ends, last = done.stdout.splitlines()
    num_attacks, content = last.split()
    assert int(num_attacks) >= 11 and content == "reached"
    assert len(ends) == int(num_attacks) and all(end.startswith("held ") for end in ends), done


def test_without_nested_namespaces_programs_share_the_workers(caplog, monkeypatch):
    outcomes = {"namespaces": "refused", "namespaces-flat": "", "landlock": ""}
    monkeypatch.setattr(probe, "try_rungs", lambda interpreter: outcomes)
    assert probe.choose_rung("namespaces", sys.executable) == "namespaces-flat"
    assert "because: refused" in caplog.text
    outcomes["namespaces-flat"] = "refused, too"
    with pytest.raises(SandboxError, match="refused, too"):
        probe.choose_rung("namespaces", sys.executable)
    assert probe.choose_rung("landlock", sys.executable) == "landlock"
    with pytest.raises(ValueError, match="isolation"):
        probe.choose_rung("none", sys.executable)


def test_a_broken_sandbox_does_not_start(monkeypatch):
    monkeypatch.setitem(canary._ATTACKS, "one that succeeds", "    pass")
    with pytest.raises(SandboxError, match="one that succeeds"):
        Sandbox(hostile.LIMITS, num_workers=1)
    monkeypatch.setitem(canary._ATTACKS, "one that succeeds", "    raise ValueError")
    with pytest.raises(SandboxError, match="ValueError"):
        Sandbox(hostile.LIMITS, num_workers=1)
    # An error that is no refusal: nothing has been shown.
    monkeypatch.setitem(canary._ATTACKS, "one that succeeds", "    raise OSError(errno.EINVAL, '')")
    with pytest.raises(SandboxError, match="one that succeeds"):
        Sandbox(hostile.LIMITS, num_workers=1)
