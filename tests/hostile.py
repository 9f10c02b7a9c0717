"""Programs that attack the sandbox, and what has to come of each.

As a script (`python tests/hostile.py RUNG NUM_WORKERS NUM_ENDLESS`) it runs them all and prints the
failures as JSON: so it can be run as another user.

Where one is to be refused, it must do no harm if it is not: it asks for what it may not have, and
leaves it as it is or puts it back.
"""

import dataclasses
import json
import os
import sys
import textwrap

from cir_jax.records import ExecResult
from cir_jax.sandbox import seccomp
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.pool import Sandbox

LIMITS = Limits(timeout_s=1.0, memory_bytes=2**30, output_bytes=100_000, num_scratch_files=1000)

DENIED = "EPERM EACCES ENOENT ESRCH EROFS ENOSYS"
"""Errors that say that something is forbidden, or not there."""
FILTERED = "EPERM ENOSYS"
"""Those of the filter of system calls."""


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    code: str
    status: str
    """Expected ones, joined by "|"."""
    text: str = ""
    """Expected beginning of stdout (if ok) or error; "|" joins alternatives."""
    lacking: str = ""
    """Rungs on which it ends otherwise, joined by "|"."""

    def fault(self, result: ExecResult) -> str:
        if result.status not in self.status.split("|"):
            return f"status {result.status} ({result.stdout[:80]!r}, {result.error[:80]!r})"
        got = result.stdout if result.status == "ok" else result.error
        if self.text and not any(got.startswith(text) for text in self.text.split("|")):
            return f"text {got[:200]!r}"
        return ""


FLAT, LANDLOCK = "namespaces-flat", "landlock"
NAMESPACES = f"namespaces|{FLAT}"


def _refused(kind: str, statement: str, errors: str = DENIED, lacking: str = "") -> Case:
    """A case that has to end with one of the errors."""
    code = (
        "import os, sys, socket, ctypes, errno, signal, resource, mmap, fcntl, time\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(number, *args):\n"
        "    if libc.syscall(number, *args) < 0:\n"
        "        raise OSError(ctypes.get_errno(), 'refused')\n"
        f"try:\n{textwrap.indent(statement, '    ')}\n"
        "except OSError as error:\n"
        "    print('refused', errno.errorcode.get(error.errno), error)\n"
        "else:\n"
        "    print('REACHED')\n"
    )
    texts = "|".join(f"refused {name} " for name in errors.split())
    return Case(kind, code, "ok", texts, lacking)


def cases() -> list[Case]:
    return (_time() + _memory() + _output() + _crashes() + _signals() + _processes() + _files()) + (
        _network() + _host() + _privileges() + _kernel() + _machine_code() + _forgeries()
    )


def _time() -> list[Case]:
    endless = [
        "while True: pass",
        "import time\nwhile True: time.sleep(1)",
        "import time\ntime.sleep(10**6)",
        "import threading\nthreading.Event().wait()",
        "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()",
        "10 ** 10 ** 10",
        "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')",
        "import signal\nfor s in range(1, 32):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import atexit\natexit.register(lambda: [None for _ in iter(int, 1)])",
        "import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f).start()",
        "import numpy as np\nwhile True: np.linalg.eig(np.random.rand(300, 300))",
        "from sympy import *\nx = symbols('x')\nfactorint(10**120 + 12345678901234567890123)",
        "class A:\n    def __repr__(self):\n        while True: pass\nA()",
        "def f():\n    try: f()\n    finally: f()\nf()",
        "import select\nselect.select([], [], [])",
        "sum(1 for _ in iter(int, 1))",
        "import sys\nsys.settrace(lambda *a: None)\nwhile True: pass",
        "import os\nos.read(os.pipe()[0], 1)",
        "import gc\ngc.disable()\nwhile True: a = []; a.append(a) if len(a) < 1 else 0",
    ]
    kept = Case("time", "print('kept')\nwhile True: pass", "timeout|oom")
    return [kept] + [Case("time", code, "timeout|oom") for code in endless]


def _memory() -> list[Case]:
    hungry = [
        "x = []\nwhile True: x.append(bytearray(10**7))",
        "x = 'x' * 10**10",
        "import numpy as np\nnp.ones((10**6, 10**6))",
        "x = [0] * 10**10",
        "bytearray(10**10)",
        "d = {}\nfor i in range(10**9): d[i] = bytes(10**6)",
        "import mmap\nx = [mmap.mmap(-1, 10**8) for _ in range(100)]",
        "x = 'a'\nwhile True: x += x",
        "import itertools\nlist(itertools.repeat(bytes(1000), 10**9))",
        "import numpy as np\na = [np.ones(10**7) for _ in range(1000)]",
    ]
    ends = "oom|error|timeout"
    caught = "try: bytearray(10**10)\nexcept MemoryError: print('caught')"
    threads = (
        "import threading, time\nstarted = 0\ntry:\n    for _ in range(10**4):\n"
        "        threading.Thread(target=time.sleep, args=(.5,), daemon=True).start()\n"
        "        started += 1\nexcept RuntimeError: print('refused', started < 100)"
    )
    return (
        [Case("memory", code, ends) for code in hungry]
        + [Case("memory", caught, "ok", "caught\n")]
        # Where threads are not counted apart, only their memory is limited.
        + [Case("memory", threads.replace("100", "65"), "ok", "refused True", LANDLOCK)]
        + [Case("memory", threads.replace("100", "1000"), "ok", "refused True")]
        + [_refused("memory", "fd = os.memfd_create('x')", FILTERED)]
        + [
            _refused("memory", f"call({number}, 0)", FILTERED)
            for number in _numbers("memfd_secret")
        ]
    )


def _output() -> list[Case]:
    long = "OSError|ValueError|SystemExit"
    return [
        Case("output", "while True: print('y' * 10**5)", "error", long),
        Case("output", "import os\nwhile True: os.write(1, b'z' * 10**6)", "error", long),
        Case("output", "import os\nwhile True: os.write(2, b'z' * 10**6)", "error"),
        Case("output", "import sys\nwhile True: sys.stderr.write('x' * 10**5)", "error"),
        _refused("output", "os.ftruncate(1, 10**12)", "EFBIG"),
        Case("output", "import os\nos.ftruncate(1, 2**23)\nprint('a')", "ok"),
        Case("output", "print('\\x00' * 50 + 'nul')", "ok", "nul"),
        Case("output", "import os\nos.write(1, bytes(range(256)))", "ok"),
        Case("output", "print('\\x1b[2J\\x1b]0;title\\x07')", "ok"),
        Case("output", "import os\nos.close(1)\nos.close(2)", "ok"),
        Case("output", "import os\nos.close(0)\nprint('x')", "ok", "x\n"),
        Case("output", "import sys\nsys.stdout = None\nprint('x')\n5", "ok"),
        Case("output", "import os\nos.lseek(1, 2**23, 0)\nprint('sparse')", "ok"),
        Case("output", "for i in range(10**4): print(i)", "ok", "0\n1\n"),
        Case("output", "print('\\ud800')", "error", "UnicodeEncodeError"),
        Case("output", "raise ValueError('x' * 10**7)", "error"),
    ]


def _crashes() -> list[Case]:
    codes = [
        "import ctypes\nctypes.string_at(0)",
        "import os\nos.abort()",
        "import faulthandler\nfaulthandler._sigsegv()",
        "import faulthandler\nfaulthandler._sigabrt()",
        "import faulthandler\nfaulthandler._sigfpe()",
        "import ctypes\nctypes.memset(1, 0, 100)",
        "import ctypes\nctypes.CDLL(None).abort()",
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n"
        "    def __getattr__(self, name): return getattr(self, name)\ngetattr(A(), 'x')",
        "import ctypes\nctypes.CFUNCTYPE(None)(0x10)()",
    ]
    return [Case("crash", code, "crashed|oom|error") for code in codes] + [
        Case("crash", "import os\nos._exit(0)", "ok"),
        Case("crash", "import os\nos._exit(7)", "error", "SystemExit: 7"),
        Case("crash", "import os\nos._exit(139)", "error", "SystemExit: 139"),
        Case("crash", "import sys\nsys.exit('message')", "error", "message"),
        Case("crash", "quit()", "ok"),
        Case("crash", "raise KeyboardInterrupt", "error", "KeyboardInterrupt"),
        Case("crash", "raise BaseException('b')", "error", "BaseException: b"),
        Case("crash", "def f(): f()\nf()", "error", "RecursionError"),
        Case("crash", "eval('(' * 10**5)", "error"),
        Case("crash", "\x00", "error", "SyntaxError|ValueError"),
        Case("crash", "import threading\nthreading._shutdown = None\nprint(1)", "ok", "1\n"),
        Case("crash", "import sys\nsys.excepthook = None\n1/0", "error", "ZeroDivisionError"),
        Case("crash", "import sys\nsys.modules.clear()\nprint(1)", "ok", "1\n"),
        Case("crash", "import builtins\ndel builtins.print\nprint(1)", "error", "NameError"),
    ]


# Where the program sees its worker. It sees no other parent, so no other process is in danger.
_SIGNALS_TO_THE_WORKER = """\
import os
if os.getppid():
    for number in range(1, 65):
        try: os.kill(os.getppid(), number)
        except PermissionError: pass
print('in vain')
"""


def _signals() -> list[Case]:
    deaths = [
        "import os\nos.kill(os.getpid(), 9)",
        "import os\nos.kill(os.getpid(), 15)",
        "import os\nos.kill(0, 9)",
        "import os\nos.kill(0, 15)",
        "import os\nos.kill(os.getpid(), 11)",
        "import signal\nsignal.raise_signal(signal.SIGKILL)",
        "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, .2)\ntime.sleep(5)",
        "import signal, time\nsignal.setitimer(signal.ITIMER_PROF, .1)\nwhile True: pass",
    ]
    return [Case("signal", code, "crashed") for code in deaths] + [
        _refused("signal", "os.kill(-1, 0)"),
        Case("signal", "import os\nos.kill(0, 19)", "ok|timeout"),
        _refused("signal", f"os.kill({os.getpid()}, 0)"),
        _refused("signal", "os.kill(os.getppid() or 2, 0)", lacking=FLAT),
        Case("signal", _SIGNALS_TO_THE_WORKER, "ok", "in vain\n"),
        _refused("signal", "os.killpg(2, 0)"),
        _refused("signal", "os.setpgid(2, 2)"),
        _refused("signal", "signal.pidfd_send_signal(os.pidfd_open(os.getpid()), 0)", FILTERED),
        _refused("signal", "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getpid())", FILTERED),
        _refused("signal", "fcntl.fcntl(os.pipe()[0], fcntl.F_SETSIG, 9)", FILTERED),
        _refused("signal", "fcntl.fcntl(os.pipe()[0], 15, bytes(8))", FILTERED),
        _refused("signal", "fcntl.ioctl(socket.socketpair()[0], 0x8901, bytes(4))", FILTERED),
        _refused("signal", "fcntl.ioctl(socket.socketpair()[0], 0x8902, bytes(4))", FILTERED),
        Case(
            "signal",
            "import signal\nsignal.signal(15, lambda *a: print('got'))\nsignal.raise_signal(15)",
            "ok",
            "got\n",
        ),
    ]


def _processes() -> list[Case]:
    refused = [
        "os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    ]
    arguments = {
        "fork": "",
        "vfork": "",
        "clone": "17, 0, 0, 0, 0",
        "clone3": "0, 88",
        "execveat": "0, b'', 0, 0, 0x1000",
        "execve": "b'/bin/true', 0, 0",
    }
    return [_refused("process", code, FILTERED) for code in refused + _calls(arguments)] + [
        # Without /dev/ptmx: an error without a number.
        _refused("process", "import pty\npty.fork()", f"{DENIED} None"),
        Case("process", "import os\nprint(os.system('true') != 0)", "ok", "True\n"),
        Case(
            "process",
            "import threading\nt = threading.Thread(target=print, args=('in',))\nt.start()",
            "ok",
            "in\n",
        ),
    ]


def _files() -> list[Case]:
    refused = [
        "open('/usr/x', 'w'); os.remove('/usr/x')",
        "open('/x', 'w'); os.remove('/x')",
        "os.open('/etc/passwd', os.O_WRONLY)",
        "os.open(os.__file__, os.O_WRONLY)",
        "os.open('/proc/sysrq-trigger', os.O_WRONLY)",
        "os.open('/proc/self/oom_score_adj', os.O_WRONLY)",
        "os.open('/dev/ptmx', os.O_RDWR)",
        "os.open('/dev/kmsg', os.O_RDONLY)",
        "os.mkdir('/run/x'); os.rmdir('/run/x')",
        "os.rmdir('/usr/bin')",  # it is not empty
        "os.rename('/usr/bin', '/usr/lib')",  # so is this one
        "os.chmod('/usr', os.stat('/usr').st_mode & 0o7777)",
        "t = os.stat('/usr')\nos.utime('/usr', ns=(t.st_atime_ns, t.st_mtime_ns))",
        "os.chmod(os.open(os.__file__, os.O_RDONLY), 0o644)",
        "os.link('/usr/bin/env', '/usr/bin/x'); os.remove('/usr/bin/x')",
        "os.symlink('/usr', '/usr/x'); os.remove('/usr/x')",
        "os.setxattr('/usr', 'user.x', b'1'); os.removexattr('/usr', 'user.x')",
        "os.mkfifo('/run/x'); os.remove('/run/x')",
        "os.mknod('x', 0o20666, os.makedev(1, 3))",
        "os.symlink('/etc/shadow', '/tmp/s'); open('/tmp/s').read()",
        "os.chroot('/usr')",
    ]
    over_limits = {
        "open('/tmp/hostile', 'wb').write(bytes(20 * 2**20))": "EFBIG",
        "[open(f'/tmp/hostile_{i}', 'wb').write(bytes(10**7)) for i in range(10)]": "ENOSPC",
        "[open(f'/dev/shm/hostile_{i}', 'wb').write(bytes(10**7)) for i in range(10)]": "ENOSPC",
        "[open(f'/tmp/hostile_{i}', 'w').close() for i in range(10**4)]": "ENOSPC",
        "open('/tmp/hostile', 'wb').truncate(10**12)": "EFBIG",
        "os.posix_fallocate(os.open('/tmp/hostile', os.O_CREAT | os.O_RDWR), 0, 10**9)": "EFBIG",
    }
    too_many = "x = [os.open('/dev/null', 0) for _ in range(10**4)]"
    deep = "import os\nfor _ in range(900):\n    os.mkdir('d'); os.chdir('d')\nprint('deep')"
    sealed = "import os\nos.mkdir('a')\nopen('a/f', 'w').close()\nos.chmod('a', 0)\nprint('a')"
    listed = "import os\nprint(os.listdir('.'))"
    return (
        [_refused("file", code) for code in refused]
        + [_refused("file", code, error, LANDLOCK) for code, error in over_limits.items()]
        + [_refused("file", code, "EACCES", NAMESPACES) for code in over_limits]
        + [_refused("file", too_many, "EMFILE")]
        + [Case("file", code, "ok", lacking=LANDLOCK) for code in (deep, sealed)]
        + [Case("file", listed, "ok", "[]\n", LANDLOCK)]
    )


def _network() -> list[Case]:
    refused = [
        "socket.socket()",
        "socket.socket(socket.AF_INET6)",
        "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "socket.socket(40, socket.SOCK_STREAM)",
        "socket.socket(38, socket.SOCK_SEQPACKET)",
        "socket.create_connection(('169.254.169.254', 80), 1)",
        "socket.create_server(('127.0.0.1', 0))",
        "import http.client\nhttp.client.HTTPConnection('127.0.0.1', 80).connect()",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
        "socket.socketpair()[0].bind('')",
        "socket.socketpair()[0].bind('/tmp/x')",
        "socket.socketpair()[0].connect('/tmp/x')",
        "socket.socketpair()[0].listen()",
    ]
    named = "import socket\nsocket.getaddrinfo('example.com', 80)"
    asyncio = "import asyncio\nasync def f(): print('async')\nasyncio.run(f())"
    pair = "import socket\na, b = socket.socketpair()\na.send(b'x')\nprint(b.recv(1))"
    rings = _calls({"io_uring_setup": "8, bytes(120)"})
    return [_refused("network", code, FILTERED) for code in refused + rings] + [
        Case("network", named, "error", "socket.gaierror"),
        Case("network", asyncio, "ok", "async\n"),
        Case("network", pair, "ok", "b'x'\n"),
    ]


def _host() -> list[Case]:
    here = os.path.abspath(__file__)
    trainer = os.getpid()
    refused = [
        "open('/etc/shadow').read()",
        f"open({here!r}).read()",
        f"os.listdir({os.path.dirname(here)!r})",
        f"open('/proc/{trainer}/environ', 'rb').read(1)",
        f"open('/proc/{trainer}/mem', 'rb').read(1)",
        f"os.listdir('/proc/{trainer}/fd')",
        f"os.listdir('/proc/{trainer}/root')",
        "os.listdir('/proc/1/fd')",
        "open('/proc/kcore', 'rb').read(1)",
        "os.listdir('/sys')",
        "os.listdir('/home')",
        "os.listdir('/var')",
    ]
    harmless = [
        "fd",
        "full",
        "null",
        "random",
        "shm",
        "stderr",
        "stdin",
        "stdout",
        "urandom",
        "zero",
    ]
    devices = "import os\nprint(sorted(os.listdir('/dev')))"
    clean = "import os\nprint(any('SECRET' in k for k in os.environ))"
    fds = (
        "import os\nopen_fds = []\nfor fd in range(3, 1024):\n    try: os.fstat(fd)\n"
        "    except OSError: continue\n    open_fds.append(fd)\nprint(open_fds)"
    )
    return [_refused("host", code) for code in refused] + [
        Case("host", devices, "ok", f"{harmless}\n", LANDLOCK),
        Case("host", clean, "ok", "False\n"),
        Case("host", fds, "ok", "[]\n"),
        Case("host", "import cir_jax", "error", "ModuleNotFoundError"),
        Case("host", "import sys\nprint([m for m in sys.modules if 'jaxlib' in m])", "ok", "[]\n"),
    ]


def _privileges() -> list[Case]:
    refused = [
        "os.setuid(0)",
        "os.setgid(0)",
        "os.setresuid(0, 0, 0)",
        "os.setgroups([0])",
        "os.setreuid(0, 0)",
        "os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))",
        "os.sched_setaffinity(2, os.sched_getaffinity(0))",
        "os.setpriority(os.PRIO_USER, 2**31 - 1, 19)",
        "os.setpriority(os.PRIO_PGRP, 0, 19)",
        "resource.prlimit(2, resource.RLIMIT_AS)",
        "time.clock_settime(0, time.time())",
        "socket.sethostname(socket.gethostname())",
    ]
    arguments = {"capset": "b'\\0' * 8, b'\\xff' * 24"}
    raised = (
        "import resource\nkinds = [getattr(resource, k) for k in dir(resource)"
        " if k.startswith('RLIMIT_')]\nfor k in ('AS', 'CPU', 'FSIZE', 'NPROC', 'NOFILE'):\n"
        "    k = getattr(resource, 'RLIMIT_' + k)\n    soft, hard = resource.getrlimit(k)\n"
        "    try: resource.setrlimit(k, (hard + 1, hard + 1)); print('RAISED')\n"
        "    except ValueError: pass\nprint('kept')"
    )
    root = "import os\nprint(os.getuid() == 0, os.geteuid() == 0)"
    status = (
        "print([l.split()[1].strip('0') for l in open('/proc/self/status')"
        " if l.startswith(('CapEff', 'CapPrm', 'CapInh', 'CapAmb', 'CapBnd'))])"
    )
    return [_refused("privilege", code, FILTERED) for code in refused + _calls(arguments)] + [
        _refused("privilege", "os.nice(-1)", "EPERM EACCES"),
        Case("privilege", raised, "ok", "kept\n"),
        Case("privilege", root, "ok", "False False\n"),
        Case("privilege", status, "ok", "['', '', '', '', '']\n", LANDLOCK),
    ]


def _numbers(name: str) -> list[int]:
    """The call's number on this machine, if it has one."""
    numbers = seccomp.numbers(os.uname().machine)
    return [numbers[name]] if name in numbers else []


def _calls(arguments: dict[str, str]) -> list[str]:
    """Statements that make these calls, so far as this machine has them."""
    return [
        f"call({number}{', ' * bool(args)}{args})  # {name}"
        for name, args in arguments.items()
        for number in _numbers(name)
    ]


def _kernel() -> list[Case]:
    """Refused by the filter: without one, most would say that their arguments are no good."""
    arguments = {
        "unshare": "0x10000000",
        "setns": "0, 0",
        "mount": "b'none', b'/tmp', b'nonesuch', 0, 0",
        "umount2": "b'/tmp/none', 2",
        "pivot_root": "b'/tmp', b'/tmp'",
        "ptrace": "0, 0, 0, 0",
        "process_vm_readv": "1, 0, 0, 0, 0, 0",
        "bpf": "0, 0, 0",
        "perf_event_open": "bytes(128), 0, -1, -1, 0",
        "userfaultfd": "1",
        "io_uring_enter": "-1, 0, 0, 0, 0",
        "keyctl": "0, -3, 0",
        "add_key": "b'user', b'x', b'y', 1, -3",
        "shmget": "0, 4096, 0o1600",
        "msgget": "0, 0o1600",
        "semget": "0, 1, 0o1600",
        "mq_open": "b'x', 66, 0o600, 0",
        "init_module": "0, 0, b''",
        "kexec_load": "0, 0, 0, 0",
        "reboot": "0, 0, 0, 0",
        "swapon": "b'/tmp/x', 0",
        "open_by_handle_at": "0, 0, 0",
        "name_to_handle_at": "-100, b'/', 0, 0, 0",
        "fanotify_init": "0, 0",
        "quotactl": "0, 0, 0, 0",
        "acct": "b'/tmp/x'",
        "syslog": "3, 0, 0",
        "iopl": "0",
        "modify_ldt": "0, 0, 0",
        "seccomp": "1, 0, 0",
        "personality": "0xffffffff",
        "fsopen": "b'tmpfs', 0",
        "open_tree": "-100, b'/', 1",
        "mount_setattr": "-100, b'/', 0, 0, 0",
        "pidfd_getfd": "0, 0, 0",
        "kcmp": "1, 1, 1, 0, 0",
        "settimeofday": "0, 0",
        "move_pages": "0, 0, 0, 0, 0, 0",
        "clone": "0x10000011, 0, 0, 0, 0",
        "prctl": "22, 2, 0, 0, 0",
        "ioctl": "0, 0x5412, b'x'",
    }
    thread_in_a_namespace = _calls({"clone": "0x10010f00, 0, 0, 0, 0"})
    future = [f"call({seccomp.NEWEST + 1}, 0)", "call(1000, 0)"]
    codes = _calls(arguments) + thread_in_a_namespace + future
    return [_refused("kernel", code, FILTERED) for code in codes]


def _machine_code() -> list[Case]:
    """Calls by other ways than the usual one, which the filter must not mistake for others."""
    if os.uname().machine != "x86_64":
        return []
    # mov eax, NUMBER; int 0x80; ret: number 20 asks for the process's number on 32-bit machines; it
    # stands for writev on 64-bit ones.
    direct = (
        "import ctypes, mmap\n"
        "page = mmap.mmap(-1, 4096, prot=7)\n"
        "page.write(b'\\xb8' + (20).to_bytes(4, 'little') + b'\\xcd\\x80\\xc3')\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
        "print('REACHED', ctypes.CFUNCTYPE(ctypes.c_long)(address)())\n"
    )
    # With 32-bit pointers: getpid, socket, ptrace, and two that have numbers of their own there,
    # execve and rt_sigaction.
    numbers = (39, 41, 101, 520, 512)
    return [Case("machine code", direct, "crashed")] + [
        _refused("machine code", f"call(0x40000000 + {number}, 0, 0, 0, 0)", "ENOSYS")
        for number in numbers
    ]


# The worker's frames are below the program's, and its objects there to be used.
_BY_THE_WORKERS_CHANNELS = """\
import os, struct, sys
frame, num_channels = sys._getframe(), 0
while frame := frame.f_back:
    template, channel = frame.f_locals.get('self'), frame.f_locals.get('channel')
    if hasattr(template, '_jobs'):
        num_channels += 1
        # That it has ended well, and has begun, as the worker hears it.
        for fd in (template._reports, template._jobs.fileno(), 3, 4, 5):
            for said in (bytes(152), struct.pack('di', 1.0, 1)):
                try: os.write(fd, said)
                except OSError: pass
    if channel is not None:
        num_channels += 1
        try: os.write(channel, struct.pack('>I', 2) + b'{}')
        except OSError: pass
os._exit(3 if num_channels >= 3 else 4)
"""


def _forgeries() -> list[Case]:
    return [
        Case("forgery", "print('{\"status\": \"ok\"}')\nraise ValueError(1)", "error", "ValueErr"),
        Case("forgery", "raise TimeoutError('slow')", "error", "TimeoutError: slow"),
        Case("forgery", "raise Exception('Done')", "error", "Exception: Done"),
        Case("forgery", "print('Done')\nimport os\nos._exit(1)", "error", "SystemExit: 1"),
        Case("forgery", "import os\nfor fd in range(3, 300):\n"
             "    try: os.write(fd, b'{\"id\": 1, \"reply\": {}}')\n    except OSError: pass\n1/0",
             "error", "ZeroDivisionError"),
        Case("forgery", "import sys\nfor m in list(sys.modules.values()):\n"
             "    if 'zygote' in getattr(m, '__name__', ''): print('zygote')\n1/0",
             "error", "ZeroDivisionError"),
        Case("forgery", "import os\nos._exit = lambda s: None\nimport sys\nsys.exit(3)",
             "error", "SystemExit: 3"),
        Case("forgery", "import gc, socket\nprint([o for o in gc.get_objects()"
             " if isinstance(o, socket.socket)])", "ok", "[]\n"),
        Case("forgery", _BY_THE_WORKERS_CHANNELS, "error", "SystemExit: 3"),
        Case("forgery", "import os\nos.write(2, b'MemoryError\\n')\nos._exit(0)", "ok"),
        Case("forgery", "import os\nos.write(1, b'timeout')\nos._exit(124)", "error"),
    ]  # fmt: skip


def traces(rung: str) -> list[tuple[str, str]]:
    """Pairs for one worker: the first leaves something, the second looks for it: "False" if it is
    gone."""
    pairs = [
        ("import math\nmath.pi = 3", "import math\nprint(math.pi == 3)"),
        ("import builtins\nbuiltins.left = 1", "print('left' in dir(__builtins__))"),
        ("import os\nos.environ['LEFT'] = '1'", "import os\nprint('LEFT' in os.environ)"),
        ("import sys\nsys.left = 1", "import sys\nprint(hasattr(sys, 'left'))"),
        ("import sympy\nsympy.pi = 3", "import sympy\nprint(sympy.pi == 3)"),
        (
            "import numpy\nnumpy.seterr(over='raise')",
            "import numpy\nprint(numpy.geterr()['over'] == 'raise')",
        ),
        ("import os\nos.umask(0o777)", "import os\nprint(os.umask(0) == 0o777)"),
        ("import os\nos.set_blocking(0, False)", "import os\nprint(not os.get_blocking(0))"),
        (
            "import sys\nsys.setrecursionlimit(50)",
            "import sys\nprint(sys.getrecursionlimit() < 99)",
        ),
    ]
    look = (
        "import os\nprint(os.stat('/tmp').st_mode & 0o7777 != 0o1777 or bool(os.listxattr('/tmp')))"
    )
    files = [
        ("open('/tmp/left', 'w').close()", "import os\nprint(os.path.exists('/tmp/left'))"),
        ("open('/dev/shm/left', 'w').close()", "import os\nprint(os.path.exists('/dev/shm/left'))"),
        ("import os\nos.chmod('/tmp', 0o555)", look),
        ("import os\nos.chmod('/tmp', 0)", look),
        ("import os\nos.setxattr('/tmp', 'user.left', b'1')", look),
    ]
    return pairs + (files if rung != LANDLOCK else [])


def run(sandbox: Sandbox, num_endless: int = 100) -> list[dict[str, str]]:
    """Runs all that the sandbox's rung can run; returns what went wrong.

    Args:
      num_endless: at most so many of the programs that take the whole time limit.
    """
    todo = [case for case in cases() if sandbox.rung not in case.lacking.split("|")]
    endless = [case for case in todo if case.kind == "time"]
    todo = [case for case in todo if case not in endless[num_endless:]]
    futures = [sandbox.submit(case.code) for case in todo]
    faults = []
    for case, future in zip(todo, futures, strict=True):
        if fault := case.fault(future.result(120)):
            faults.append({"kind": case.kind, "code": case.code[-300:], "fault": fault})
    # One after the other: while nothing else runs it is always the first worker's turn.
    for leaving, looking in traces(sandbox.rung):
        for code, text in ((leaving, ""), (looking, "False")):
            case = Case("trace", code, "ok", text)
            if fault := case.fault(sandbox.submit(code).result(120)):
                faults.append({"kind": "trace", "code": code, "fault": fault})
    if num_lost := sandbox.stats()["restarts"]:
        faults.append({"kind": "worker", "code": "", "fault": f"{num_lost} workers lost"})
    return faults


if __name__ == "__main__":
    rung, num_workers, num_endless = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with Sandbox(LIMITS, num_workers, isolation=rung) as sandbox:
        report = {"rung": sandbox.rung, "user": os.geteuid(), "num_cases": len(cases())}
        print(json.dumps(report | {"faults": run(sandbox, num_endless)}))
