"""The filter of system calls, interpreted instruction by instruction."""

import errno
import fcntl
import os
import re
import struct
from pathlib import Path

import pytest

from cir_jax.sandbox import seccomp

X86, ARM = 0xC000003E, 0xC00000B7
ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


def interpret(code, number, args=(), arch=X86):
    """What the kernel does: classic BPF on struct seccomp_data."""
    padded = (tuple(args) + (0,) * 6)[:6]
    data = struct.pack("<iIQ6Q", number, arch, 0, *(arg % 2**64 for arg in padded))
    program = [struct.unpack_from("<HBBI", code, i) for i in range(0, len(code), 8)]
    word, at = 0, 0
    while True:
        operation, if_true, if_false, value = program[at]
        at += 1
        if operation == 0x20:
            word = struct.unpack_from("<I", data, value)[0]
        elif operation == 0x05:
            at += value
        elif operation == 0x06:
            return value
        else:
            passed = {0x15: word == value, 0x35: word >= value, 0x45: bool(word & value)}
            at += if_true if passed[operation] else if_false


def build(signals="first_process", allow=False, pid=0, machine="x86_64"):
    code = seccomp.build(signals, allow_processes=allow, pid=pid, machine=machine)
    numbers = seccomp.numbers(machine)
    arch = {"x86_64": X86, "aarch64": ARM}[machine]
    return lambda name, *args: interpret(
        code, name if isinstance(name, int) else numbers[name], args, arch
    )


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_number(machine):
    """By number: exactly those of the table that have a rule are not simply allowed."""
    call = build(machine=machine)
    numbers = seccomp.numbers(machine)
    refused = {numbers[name] for name in seccomp._REFUSED if name in numbers}
    refused |= {numbers[n] for n in seccomp._STARTING_PROCESSES if n in numbers}
    # With all arguments 0: no thread, no AF_UNIX, no known request.
    refused |= {numbers["clone"], numbers["socketpair"], numbers["ioctl"]}
    for number in range(seccomp.NEWEST + 1):
        want = EPERM if number in refused else ALLOW
        if number == numbers["clone3"]:
            want = ENOSYS
        assert call(number) == want, number
    for number in (seccomp.NEWEST + 1, 1000, 2**30, 2**30 + 101, 2**31 - 1):
        assert call(number) == ENOSYS


def test_other_architectures_are_killed():
    code = seccomp.build("namespace", allow_processes=True, machine="x86_64")
    assert interpret(code, 0, arch=0x40000003) == KILL
    assert interpret(code, 0, arch=ARM) == KILL


def test_arguments():
    call = build()
    thread = 0x3D0F00
    assert call("clone", thread) == ALLOW
    assert call("clone", 17) == EPERM  # SIGCHLD: a process
    for flag in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 1 << 30):
        assert call("clone", thread | flag) == EPERM
        assert build(allow=True)("clone", 17 | flag) == EPERM
    assert build(allow=True)("clone", 17) == build(allow=True)("fork") == ALLOW
    stream, datagram, sequence, close_on_exec = 1, 2, 5, 0x80000
    assert call("socketpair", 1, stream) == call("socketpair", 1, stream | close_on_exec) == ALLOW
    assert call("socketpair", 2, stream) == EPERM
    for kind in (0, datagram, sequence, datagram | close_on_exec):
        assert call("socketpair", 1, kind) == EPERM
    assert call("ioctl", 0, 0x5401) == call("ioctl", 0, 0x5421) == ALLOW
    # TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP, FS_IOC_SETFLAGS
    for request in (0x5412, 0x541C, 0x8901, 0x8902, 0x40086602):
        assert call("ioctl", 0, request) == EPERM
    assert call("fcntl", 0, fcntl.F_SETFL) == call("fcntl", 0, fcntl.F_GETOWN) == ALLOW
    for command in (fcntl.F_SETOWN, fcntl.F_SETSIG, 15, fcntl.F_SETLEASE):
        assert call("fcntl", 0, command) == EPERM
    assert call("prlimit64", 0) == ALLOW and call("prlimit64", 7) == EPERM
    assert call("prctl", 22) == EPERM and call("prctl", 15) == call("prctl", 1) == ALLOW
    assert call("setpriority", os.PRIO_PROCESS, 0, 5) == ALLOW
    for which, who in ((os.PRIO_PROCESS, 7), (os.PRIO_PGRP, 0), (os.PRIO_USER, 0)):
        assert call("setpriority", which, who, 5) == EPERM


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_files_where_they_are_the_trainers(machine):
    inside, own = build(machine=machine), build("own", pid=77, machine=machine)
    numbers = seccomp.numbers(machine)
    names = "truncate chmod fchmod fchmodat fchmodat2 chown lchown fchown fchownat utime utimes "
    names += "futimesat utimensat setxattr lsetxattr fsetxattr removexattr lremovexattr "
    names += "fremovexattr"
    names = [name for name in names.split() if name in numbers]
    assert len(names) >= 13
    for name in names:
        assert (inside(name), own(name)) == (ALLOW, EPERM), name
    assert (inside("openat2"), own("openat2")) == (ALLOW, ENOSYS)
    for name, first in {"open": [0], "openat": [0, 0]}.items():
        if name in numbers:
            for mode, want in ((0, EPERM), (1, ALLOW), (2, ALLOW), (3, EPERM)):
                flags = mode | os.O_TRUNC | os.O_CLOEXEC
                assert own(name, *first, flags) == want
                assert inside(name, *first, flags) == own(name, *first, mode) == ALLOW


def test_signals():
    first, shared, own = build(), build("namespace"), build("own", pid=77)
    assert first("kill", 1, 9) == first("kill", 0, 9) == first("tgkill", 1, 1, 6) == KILL
    assert first("kill", 1, 15) == first("kill", 5, 9) == first("kill", -1, 9) == ALLOW
    assert shared("kill", 1, 9) == ALLOW
    assert own("kill", 77, 9) == own("kill", 0, 15) == own("tgkill", 77, 78, 6) == ALLOW
    assert own("kill", 78, 0) == own("kill", -1, 9) == own("kill", 1, 9) == EPERM
    assert own("tkill", 78, 9) == own("prctl", 1, 0) == own("pidfd_open", 1) == EPERM
    assert own("prctl", 15) == own("pidfd_open", 77) == ALLOW and own("prctl", 22) == EPERM


@pytest.mark.parametrize(
    ("machine", "header"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_numbers_are_the_kernels(machine, header):
    if not Path(header).is_file():
        pytest.skip(f"no {header}")
    pattern = r"#define __NR(?:3264)?_(\w+) (\d+)"
    found = {name: int(number) for name, number in re.findall(pattern, Path(header).read_text())}
    numbers = seccomp.numbers(machine)
    assert len(numbers) > 80
    assert {name: found.get(name, number) for name, number in numbers.items()} == numbers
    for name in ("unshare", "ptrace", "mount", "kill"):
        assert name in found  # the comparison is one of something
    # What the table says that a machine lacks, it lacks.
    everywhere = seccomp.numbers("x86_64").keys() | seccomp.numbers("aarch64").keys()
    assert not (everywhere - numbers.keys()) & found.keys()
