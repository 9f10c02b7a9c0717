"""The system calls that a program may not make, as a seccomp filter.

The filter is a program of classic BPF, eight bytes an instruction, which the kernel runs on each
system call with its number, architecture and arguments. It is put together here, so that nothing
needs to be installed for it. Everything that is not named is allowed, up to the newest call known
here; newer ones do not exist for a program.

Numbers: Linux's asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).
"""

import errno
import fcntl
import functools
import os
import signal
import struct
from typing import Literal

from cir_jax.prctl import SET_PDEATHSIG, SET_SECCOMP
from cir_jax.sandbox import linux

_TABLE = """
acct 163 89 | add_key 248 217 | adjtimex 159 171 | bind 49 200 | bpf 321 280 | capset 126 91
chmod 90 - | chown 92 - | chroot 161 51 | clock_adjtime 305 266 | clock_settime 227 112
clone 56 220 | clone3 435 435 | connect 42 203 | delete_module 176 106 | execve 59 221
execveat 322 281 | fanotify_init 300 262 | fchmod 91 52 | fchmodat 268 53 | fchmodat2 452 452
fchown 93 55 | fchownat 260 54 | fcntl 72 25 | finit_module 313 273 | fork 57 -
fremovexattr 199 16 | fsconfig 431 431 | fsetxattr 190 7 | fsmount 432 432 | fsopen 430 430
fspick 433 433 | futimesat 261 - | get_kernel_syms 177 - | init_module 175 105
io_uring_enter 426 426 | io_uring_register 427 427 | io_uring_setup 425 425 | ioctl 16 29
ioperm 173 - | iopl 172 - | ioprio_set 251 30 | kcmp 312 272 | kexec_file_load 320 294
kexec_load 246 104 | keyctl 250 219 | kill 62 129 | lchown 94 - | listen 50 201
lookup_dcookie 212 18 | lremovexattr 198 15 | lsetxattr 189 6 | mbind 237 235
memfd_create 319 279 | memfd_secret 447 447 | migrate_pages 256 238 | mknod 133 -
mknodat 259 33 | modify_ldt 154 - | mount 165 40 | mount_setattr 442 442 | move_mount 429 429
move_pages 279 239 | mq_getsetattr 245 185 | mq_notify 244 184 | mq_open 240 180
mq_timedreceive 243 183 | mq_timedsend 242 182 | mq_unlink 241 181 | msgctl 71 187
msgget 68 186 | msgrcv 70 188 | msgsnd 69 189 | name_to_handle_at 303 264 | nfsservctl 180 42
open 2 - | open_by_handle_at 304 265 | open_tree 428 428 | openat 257 56 | openat2 437 437
perf_event_open 298 241 | personality 135 92 | pidfd_getfd 438 438 | pidfd_open 434 434
pidfd_send_signal 424 424 | pivot_root 155 41 | prctl 157 167 | prlimit64 302 261
process_madvise 440 440 | process_mrelease 448 448 | process_vm_readv 310 270
process_vm_writev 311 271 | ptrace 101 117 | quotactl 179 60 | quotactl_fd 443 443
reboot 169 142 | removexattr 197 14 | request_key 249 218 | rt_sigqueueinfo 129 138
rt_tgsigqueueinfo 297 240 | sched_setaffinity 203 122 | sched_setattr 314 274
sched_setparam 142 118 | sched_setscheduler 144 119 | seccomp 317 277 | semctl 66 191
semget 64 190 | semop 65 193 | semtimedop 220 192 | set_mempolicy 238 237
set_mempolicy_home_node 450 450 | setdomainname 171 162 | setfsgid 123 152 | setfsuid 122 151
setgid 106 144 | setgroups 116 159 | sethostname 170 161 | setns 308 268 | setpriority 141 140
setregid 114 143 | setresgid 119 149 | setresuid 117 147 | setreuid 113 145
settimeofday 164 170 | setuid 105 146 | setxattr 188 5 | shmat 30 196 | shmctl 31 195
shmdt 67 197 | shmget 29 194 | socket 41 198 | socketpair 53 199 | swapoff 168 225
swapon 167 224 | syslog 103 116 | tgkill 234 131 | tkill 200 130 | truncate 76 45
umount2 166 39 | unshare 272 97 | uselib 134 - | userfaultfd 323 282 | ustat 136 - | utime 132 -
utimensat 280 88 | utimes 235 - | vfork 58 - | vhangup 153 58 | vserver 236 -
"""
NEWEST = 462
"""mseal, of Linux 6.10."""

_ARCHITECTURES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}
"""Machine -> AUDIT_ARCH number, column in the table."""

# Refused whatever their arguments. What reaches into other processes, mounts, the kernel itself,
# the clock, users and rights; kernel objects that outlive a process; memory outside of the limits;
# what a socket needs to reach another process; and further filters, which are code in the kernel.
_REFUSED = (
    "ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd "
    "pidfd_send_signal rt_sigqueueinfo rt_tgsigqueueinfo "
    "unshare setns mount umount2 mount_setattr move_mount open_tree fsopen fsconfig fsmount fspick "
    "pivot_root chroot mknod mknodat name_to_handle_at open_by_handle_at quotactl quotactl_fd "
    "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register "
    "fanotify_init add_key request_key keyctl memfd_create memfd_secret "
    "shmget shmat shmctl shmdt msgget msgsnd msgrcv msgctl semget semop semtimedop semctl "
    "mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr "
    "init_module finit_module delete_module get_kernel_syms kexec_load kexec_file_load reboot "
    "swapon swapoff acct syslog vhangup lookup_dcookie nfsservctl uselib ustat vserver "
    "iopl ioperm modify_ldt settimeofday clock_settime clock_adjtime adjtimex "
    "sethostname setdomainname setuid setgid setreuid setregid setresuid setresgid setfsuid "
    "setfsgid setgroups capset sched_setscheduler sched_setattr sched_setparam ioprio_set "
    "migrate_pages move_pages mbind set_mempolicy set_mempolicy_home_node "
    "socket bind connect listen seccomp personality"
).split()
# Refused where a program has the trainer's user and sees the trainer's files: Landlock stops none
# of these, but for truncate from its third version on.
_CHANGING_FILES = (
    "truncate chmod fchmod fchmodat fchmodat2 chown lchown fchown fchownat "
    "utime utimes futimesat utimensat "
    "setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr"
).split()
_STARTING_PROCESSES = ("fork", "vfork", "execve", "execveat")

_NEW_NAMESPACES = (
    linux.CLONE_NEWTIME
    | linux.CLONE_NEWNS
    | linux.CLONE_NEWCGROUP
    | linux.CLONE_NEWUTS
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUSER
    | linux.CLONE_NEWPID
    | linux.CLONE_NEWNET
)

# Instruction codes: BPF_LD|W|ABS, BPF_JMP|JA, JMP|JEQ|K, JMP|JGE|K, JMP|JSET|K, BPF_RET|K.
_LOAD, _JUMP, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
# Offsets in struct seccomp_data; arguments are 64 bits, their low half first.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

_AF_UNIX, _SOCK_STREAM, _OTHER_SOCKET_TYPES = 1, 1, 0xE
_F_SETOWN_EX = 15
# What is asked of a descriptor itself: TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX,
# FIOCLEX. Others push input into terminals, send signals or set attributes of files.
_IOCTLS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# F_SETOWN and the like: whom a descriptor signals, and with what; the kernel asks less of that than
# of kill. F_SETLEASE: makes others wait who open the file.
_FCNTLS_REFUSED = (fcntl.F_SETOWN, fcntl.F_SETSIG, _F_SETOWN_EX, fcntl.F_SETLEASE)

# SIGKILL cannot be handled; the others are not, in practice. (Ones that are get a handler, see
# isolation.py.)
_DEADLY_SIGNALS = (
    signal.SIGKILL,
    signal.SIGABRT,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGTRAP,
    signal.SIGSYS,
)

Signals = Literal["first_process", "namespace", "own"]
"""Whom a program may signal: it is process 1 of a namespace of its own; it shares one with its
worker; or it shares one with everybody, and may reach itself only."""


def _error(number: int) -> int:
    return 0x00050000 | number


class _Assembler:
    """Collects instructions; jumps go forward over whole blocks, so no labels are needed."""

    def __init__(self):
        self.code: list[tuple[int, int, int, int]] = []

    def load(self, offset: int) -> None:
        self.code.append((_LOAD, 0, 0, offset))

    def give(self, action: int) -> None:
        self.code.append((_RETURN, 0, 0, action))

    def when(self, test: int, value: int, block: "_Assembler", *, negate: bool = False) -> None:
        """Runs the block if the loaded word passes the test (or fails it, with `negate`)."""
        skip = len(block.code)
        if skip > 255:
            raise ValueError(f"a block of {skip} instructions is too long for a jump")
        self.code.append((test, *((skip, 0) if negate else (0, skip)), value))
        self.code += block.code

    def assemble(self) -> bytes:
        return b"".join(struct.pack("<HBBI", *instruction) for instruction in self.code)


def _giving(action: int) -> _Assembler:
    block = _Assembler()
    block.give(action)
    return block


def _argument(index: int) -> _Assembler:
    block = _Assembler()
    block.load(_ARGUMENTS + 8 * index)
    return block


@functools.cache
def numbers(machine: str) -> dict[str, int]:
    """Name -> number of the calls in the table that the machine's kernel has."""
    column = _ARCHITECTURES[machine][1]
    rows = (row.split() for row in _TABLE.replace("\n", "|").split("|"))
    return {row[0]: int(row[column]) for row in rows if row and row[column] != "-"}


def supported(machine: str | None = None) -> bool:
    """Whether there is a filter for this kind of machine."""
    return (machine or os.uname().machine) in _ARCHITECTURES


def build(signals: Signals, *, allow_processes: bool, pid: int = 0, machine: str = "") -> bytes:
    """The filter.

    Args:
      signals: whom a program may signal.
      allow_processes: whether it may start processes; threads it always may.
      pid: its process number, for signals="own".
      machine: as os.uname says; "" is this one.
    """
    machine = machine or os.uname().machine
    number = numbers(machine)
    refused = _error(errno.EPERM)
    rules = {name: _Assembler() for name in _REFUSED if name in number}
    if not allow_processes:
        rules |= {name: _Assembler() for name in _STARTING_PROCESSES if name in number}
    for rule in rules.values():
        rule.give(refused)
    # Flags in memory are out of a filter's sight; the C library then uses clone.
    rules["clone3"] = _giving(_error(errno.ENOSYS))
    rules |= _argument_rules(allow_processes) | _signal_rules(signals, pid)
    if signals == "own":
        rules |= {name: _giving(refused) for name in _CHANGING_FILES if name in number}
        rules |= _opening_rules(number)

    program = _Assembler()
    program.load(_ARCHITECTURE)
    program.when(_IF_EQUAL, _ARCHITECTURES[machine][0], _giving(_KILL), negate=True)
    program.load(_NUMBER)
    program.code += _search({number[name]: rule.code for name, rule in rules.items()})
    return program.assemble()


def _search(rules: dict[int, list]) -> list:
    """A binary search for the call's number; each rule ends in a return.

    When a filter is installed the kernel runs it once for each number, so a long row of
    comparisons would cost each program a good part of its start.
    """
    allow, unknown = _giving(_ALLOW).code, _giving(_error(errno.ENOSYS)).code
    # Number from which on -> what to do, up to the next one. The last also holds for what x86_64
    # numbers from 2**30 on: the calls of its variant with 32-bit pointers.
    starts = {0: allow}
    for number in sorted(rules):
        starts[number] = rules[number]
        starts.setdefault(number + 1, allow)
    starts = dict(sorted(starts.items())) | {NEWEST + 1: unknown}
    ranges: list[tuple[int, list]] = []
    for first, code in starts.items():
        if not ranges or ranges[-1][1] != code:
            ranges.append((first, code))

    def tree(part: list[tuple[int, list]]) -> list:
        if len(part) == 1:
            return part[0][1]
        middle = len(part) // 2
        low, high = tree(part[:middle]), tree(part[middle:])
        return [(_IF_AT_LEAST, 0, 1, part[middle][0]), (_JUMP, 0, 0, len(low)), *low, *high]

    return tree(ranges)


def _argument_rules(allow_processes: bool) -> dict[str, "_Assembler"]:
    refused = _giving(_error(errno.EPERM))
    clone, pair, ioctl, fcntl_, prctl = (_argument(index) for index in (0, 0, 1, 1, 0))
    clone.when(_IF_ANY_BIT, _NEW_NAMESPACES, refused)
    if not allow_processes:
        clone.when(_IF_ANY_BIT, linux.CLONE_THREAD, refused, negate=True)
    # Only a stream has to be connected: a datagram may be sent to any name in sight.
    pair.when(_IF_EQUAL, _AF_UNIX, refused, negate=True)
    pair.code += _argument(1).code
    pair.when(_IF_ANY_BIT, _OTHER_SOCKET_TYPES, refused)
    pair.when(_IF_ANY_BIT, _SOCK_STREAM, refused, negate=True)
    for command in _IOCTLS:
        ioctl.when(_IF_EQUAL, command, _giving(_ALLOW))
    ioctl.give(_error(errno.EPERM))
    for command in _FCNTLS_REFUSED:
        fcntl_.when(_IF_EQUAL, command, refused)
    prctl.when(_IF_EQUAL, SET_SECCOMP, refused)
    rules = {"clone": clone, "socketpair": pair, "ioctl": ioctl, "fcntl": fcntl_, "prctl": prctl}
    # Of any process but the caller: 0 as the number stands for it, for setpriority if the first
    # argument says that it is one of a process (0), not of a user.
    for name, indices in (("prlimit64", [0]), ("sched_setaffinity", [0]), ("setpriority", [0, 1])):
        rules[name] = _Assembler()
        for index in indices:
            rules[name].code += _argument(index).code
            rules[name].when(_IF_EQUAL, 0, refused, negate=True)
    for rule in rules.values():
        rule.give(_ALLOW)
    return rules


def _opening_rules(number: dict[str, int]) -> dict[str, "_Assembler"]:
    """No file is cut to no length as it is opened, but one that may be written to.

    That needs no access that the first versions of Landlock know of, if the file is opened for
    reading, or (access mode 3) for neither reading nor writing.
    """
    rules = {"openat2": _giving(_error(errno.ENOSYS))}  # its flags lie in memory
    for name, index in (("open", 1), ("openat", 2)):
        if name in number:
            unless_both = _Assembler()
            unless_both.when(_IF_ANY_BIT, os.O_RDWR, _giving(_error(errno.EPERM)))
            unless_both.give(_ALLOW)
            cut = _Assembler()
            cut.when(_IF_ANY_BIT, os.O_WRONLY, unless_both)
            cut.when(_IF_ANY_BIT, os.O_RDWR, _giving(_ALLOW))
            cut.give(_error(errno.EPERM))
            rules[name] = _argument(index)
            rules[name].when(_IF_ANY_BIT, os.O_TRUNC, cut)
            rules[name].give(_ALLOW)
    return rules


def _signal_rules(signals: Signals, pid: int) -> dict[str, _Assembler]:
    rules = {name: _argument(0) for name in ("kill", "tkill", "tgkill")}
    if signals == "first_process":
        # The kernel spares the first process of a namespace from its own signals; elsewhere a
        # program that sends one of these to itself, or to its process group, dies.
        for name, rule in rules.items():
            deadly = _argument(2 if name == "tgkill" else 1)
            for number in _DEADLY_SIGNALS:
                deadly.when(_IF_EQUAL, number, _giving(_KILL))
            deadly.give(_ALLOW)
            for target in (1, 0):
                rule.when(_IF_EQUAL, target, deadly)
            rule.give(_ALLOW)
    elif signals == "own":
        for name, rule in rules.items():
            rule.when(_IF_EQUAL, pid, _giving(_ALLOW))
            if name == "kill":
                rule.when(_IF_EQUAL, 0, _giving(_ALLOW))  # a process group of its own
            rule.give(_error(errno.EPERM))
        rules["prctl"] = _argument(0)
        for option in (SET_SECCOMP, SET_PDEATHSIG):
            rules["prctl"].when(_IF_EQUAL, option, _giving(_error(errno.EPERM)))
        rules["prctl"].give(_ALLOW)
        rules["pidfd_open"] = _argument(0)
        rules["pidfd_open"].when(_IF_EQUAL, pid, _giving(_ALLOW))
        rules["pidfd_open"].give(_error(errno.EPERM))
    else:
        return {}
    return rules
