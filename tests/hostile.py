"""Programs that attack the sandbox, and what has to come of each.

As a script (`python tests/hostile.py RUNG NUM_WORKERS NUM_ENDLESS`) it runs them all and prints the
failures as JSON: so it can be run as another user.
"""

import dataclasses
import json
import os
import sys

from cir_jax.records import ExecResult
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.pool import Sandbox

LIMITS = Limits(timeout_s=1.0, memory_bytes=2**30, output_bytes=100_000)

REFUSED = "PermissionError|OSError|FileNotFoundError|ProcessLookupError"
REFUSED += "|IsADirectoryError|socket.gaierror|urllib.error.URLError"
"""Error names by which a system call can be refused."""


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    code: str
    status: str
    """Expected ones, joined by "|"."""
    text: str = ""
    """Expected beginning of stdout (if ok) or error; "|" joins alternatives."""
    needs: str = ""
    """What a weaker rung has not: "files" to write to, a process "namespace" of its own."""

    def fault(self, result: ExecResult) -> str:
        if result.status not in self.status.split("|"):
            return f"status {result.status} ({result.stdout[:80]!r}, {result.error[:80]!r})"
        got = result.stdout if result.status == "ok" else result.error
        if self.text and not any(got.startswith(text) for text in self.text.split("|")):
            return f"text {got[:200]!r}"
        return ""


def _refused(kind: str, statement: str, needs: str = "") -> Case:
    code = (
        "import os, sys, socket, ctypes, signal, resource, mmap, fcntl, time\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(number, *args):\n"
        "    if libc.syscall(number, *args) < 0:\n"
        "        raise OSError(ctypes.get_errno(), 'refused')\n"
        f"{statement}\nprint('REACHED')\n"
    )
    return Case(kind, code, "error", REFUSED, needs)


def cases() -> list[Case]:
    return (_time() + _memory() + _output() + _crashes() + _signals() + _processes() + _files()) + (
        _network() + _host() + _privileges() + _kernel() + _forgeries() + _traces()
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
        + [Case("memory", caught, "ok", "caught\n"), Case("memory", threads, "ok", "refused True")]
        + [_refused("memory", "fd = os.memfd_create('x')")]
        + [_refused("memory", "call(447, 0)")]
    )


def _output() -> list[Case]:
    long = "OSError|ValueError|SystemExit"
    return [
        Case("output", "while True: print('y' * 10**5)", "error", long),
        Case("output", "import os\nwhile True: os.write(1, b'z' * 10**6)", "error", long),
        Case("output", "import os\nwhile True: os.write(2, b'z' * 10**6)", "error"),
        Case("output", "import sys\nwhile True: sys.stderr.write('x' * 10**5)", "error"),
        Case("output", "import os\nos.ftruncate(1, 10**12)", "error", REFUSED),
        Case("output", "import os\nos.ftruncate(1, 2**23)\nprint('a')", "ok"),
        Case("output", "print('\\x00' * 50 + 'nul')", "ok", "nul"),
        Case("output", "import os\nos.write(1, bytes(range(256)))", "ok"),
        Case("output", "print('\\x1b[2J\\x1b]0;title\\x07')", "ok"),
        Case("output", "import os\nos.close(1)\nos.close(2)", "ok|error"),
        Case("output", "import os\nos.close(0)\nprint('x')", "ok", "x\n"),
        Case("output", "import sys\nsys.stdout = None\nprint('x')\n5", "ok|error"),
        Case("output", "import os\nos.lseek(1, 2**23, 0)\nprint('sparse')", "ok"),
        Case("output", "for i in range(10**5): print(i)", "ok", "0\n1\n"),
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
        Case("crash", "import threading\nthreading._shutdown = None\nprint(1)", "ok|error"),
        Case("crash", "import sys\nsys.excepthook = None\n1/0", "ok|error"),
        Case("crash", "import sys\nsys.modules.clear()\nprint(1)", "ok|error"),
        Case("crash", "import builtins\ndel builtins.print\nprint(1)", "error", "NameError"),
    ]


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
        Case("signal", "import os\nos.kill(-1, 9)\nprint('alone')", "ok|error|crashed"),
        Case("signal", "import os\nos.kill(0, 19)", "ok|timeout"),
        _refused("signal", f"os.kill({os.getpid()}, 9)"),
        _refused("signal", "os.kill(os.getppid() or 2, 9)", "namespace"),
        _refused("signal", "os.killpg(2, 9)"),
        _refused("signal", "os.setpgid(2, 2)"),
        _refused("signal", "fd = os.pidfd_open(os.getpid())\nsignal.pidfd_send_signal(fd, 0)"),
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
        "os.system('true') and call(57)",
        "import subprocess\nsubprocess.run(['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import pty\npty.fork()",
        "while True: os.fork()",
        "call(57)",
        "call(58)",
        "call(56, 17, 0, 0, 0, 0)",
        "call(435, 0, 88)",
        "call(322, 0, b'', 0, 0, 0x1000)",
        "call(59, b'/bin/true', 0, 0)",
    ]
    return [_refused("process", code) for code in refused] + [
        Case(
            "process",
            "import threading\nt = threading.Thread(target=print, args=('in',))\nt.start()",
            "ok",
            "in\n",
        ),
    ]


def _files() -> list[Case]:
    refused = [
        "open('/usr/x', 'w')",
        "open('/x', 'w')",
        "open('/etc/passwd', 'a')",
        "open('/proc/sys/kernel/core_pattern', 'w')",
        "open('/proc/sysrq-trigger', 'w')",
        "open('/dev/sda', 'rb')",
        "open('/dev/mem', 'rb')",
        "open('/dev/kmsg', 'rb')",
        "os.mkdir('/run/x')",
        "os.remove('/usr/bin/env')",
        "os.rename('/usr', '/tmp/usr')",
        "os.chmod('/usr/bin/env', 0o777)",
        "os.utime('/usr/bin/env')",
        "os.link('/usr/bin/env', '/tmp/env')",
        "os.mknod('/tmp/x', 0o60666, os.makedev(8, 0))",
        "os.symlink('/etc/shadow', '/tmp/s'); open('/tmp/s').read()",
        "open('/tmp/f', 'wb').write(bytes(20 * 2**20))",
        "[open(f'/tmp/{i}', 'wb').write(bytes(10**7)) for i in range(10)]",
        "[open(f'/dev/shm/{i}', 'wb').write(bytes(10**7)) for i in range(10)]",
        "[open(f'/tmp/{i}', 'w').close() for i in range(10**5)]",
        "x = [os.open('/dev/null', 0) for _ in range(10**4)]",
        "os.chroot('/tmp')",
        "f = open('/tmp/x', 'wb'); f.truncate(10**12)",
        "os.posix_fallocate(os.open('/tmp/x', os.O_CREAT | os.O_RDWR), 0, 10**9)",
        "os.setxattr('/usr', 'user.x', b'1')",
        "os.mkfifo('/run/fifo')",
    ]
    deep = "import os\nfor _ in range(3000):\n    os.mkdir('d'); os.chdir('d')\nprint('deep')"
    sealed = "import os\nos.mkdir('a')\nopen('a/f', 'w').close()\nos.chmod('a', 0)\nprint('a')"
    listed = "import os\nprint(os.listdir('.'))"
    return (
        [_refused("file", code) for code in refused]
        + [Case("file", code, "ok", needs="files") for code in (deep, sealed)]
        + [Case("file", listed, "ok", "[]\n", "files")]
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
        "socket.create_connection(('metadata.google.internal', 80), 1)",
        "socket.create_server(('127.0.0.1', 0))",
        "socket.getaddrinfo('example.com', 80)",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1', timeout=1)",
        "import http.client\nhttp.client.HTTPConnection('127.0.0.1', 80).connect()",
        "call(425, 8, bytes(120))",
    ]
    asyncio = "import asyncio\nasync def f(): print('async')\nasyncio.run(f())"
    pair = "import socket\na, b = socket.socketpair()\na.send(b'x')\nprint(b.recv(1))"
    names = "socket.socket().bind(('', 80))\n"
    return [_refused("network", code) for code in [*refused, names]] + [
        Case("network", asyncio, "ok", "async\n"),
        Case("network", pair, "ok", "b'x'\n"),
    ]


def _host() -> list[Case]:
    here = os.path.abspath(__file__)
    home = os.path.expanduser("~")
    trainer = os.getpid()
    refused = [
        "open('/etc/shadow').read()",
        f"open({here!r}).read()",
        f"os.listdir({home + '/.ssh'!r})",
        f"open('/proc/{trainer}/environ', 'rb').read(1)",
        f"open('/proc/{trainer}/mem', 'rb').read(1)",
        f"os.listdir('/proc/{trainer}/fd')",
        f"os.listdir('/proc/{trainer}/root')",
        "os.listdir('/proc/2/fd')",
        "open('/proc/kcore', 'rb').read(1)",
        "os.listdir('/sys')",
        "os.listdir('/home')",
        "os.listdir('/var')",
        "os.listdir('/dev/vfio')",
        "os.listdir('/dev/dri')",
        "os.open('/dev/accel0', 0)",
        "os.open('/dev/tty', 0)",
    ]
    clean = "import os\nprint(any('SECRET' in k for k in os.environ))"
    fds = (
        "import os\nopen_fds = []\nfor fd in range(3, 1024):\n    try: os.fstat(fd)\n"
        "    except OSError: continue\n    open_fds.append(fd)\nprint(open_fds)"
    )
    return [_refused("host", code) for code in refused] + [
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
        "os.nice(-5)",
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
        "os.sched_setaffinity(2, {0})",
        "resource.prlimit(2, resource.RLIMIT_AS, (1, 1))",
        "call(126, b'\\0' * 8, b'\\xff' * 24)",
        "time.clock_settime(0, 0)",
        "socket.sethostname('x')",
    ]
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
        " if l.startswith(('CapEff', 'CapPrm', 'CapInh', 'CapAmb'))])"
    )
    return [_refused("privilege", code) for code in refused] + [
        Case("privilege", raised, "ok", "kept\n"),
        Case("privilege", root, "ok", "False False\n"),
        Case("privilege", status, "ok|error", "['', '', '', '']|FileNotFoundError", "files"),
    ]


def _kernel() -> list[Case]:
    # x86_64's numbers.
    numbers = {
        "unshare user": "272, 0x10000000",
        "unshare mount": "272, 0x20000",
        "setns": "308, 0, 0",
        "mount": "165, b'none', b'/tmp', b'tmpfs', 0, 0",
        "umount": "166, b'/tmp', 2",
        "pivot_root": "155, b'/tmp', b'/tmp'",
        "ptrace": "101, 0, 0, 0, 0",
        "process_vm_readv": "310, 1, 0, 0, 0, 0, 0",
        "bpf": "321, 0, 0, 0",
        "perf_event_open": "298, bytes(128), 0, -1, -1, 0",
        "userfaultfd": "323, 1",
        "io_uring_setup": "425, 8, bytes(120)",
        "keyctl": "250, 0, -3, 0",
        "add_key": "248, b'user', b'x', b'y', 1, -3",
        "shmget": "29, 0, 4096, 0o1666",
        "msgget": "68, 0, 0o1666",
        "semget": "64, 0, 1, 0o1666",
        "mq_open": "240, b'x', 66, 0o600, 0",
        "init_module": "175, 0, 0, b''",
        "kexec_load": "246, 0, 0, 0, 0",
        "reboot": "169, 0, 0, 0, 0",
        "swapon": "167, b'/tmp/x', 0",
        "open_by_handle_at": "304, 0, 0, 0",
        "name_to_handle_at": "303, -100, b'/', 0, 0, 0",
        "fanotify_init": "300, 0, 0",
        "quotactl": "179, 0, 0, 0, 0",
        "acct": "163, b'/tmp/x'",
        "syslog": "103, 3, 0, 0",
        "iopl": "172, 3",
        "modify_ldt": "154, 0, 0, 0",
        "personal filter": "317, 1, 0, 0",
        "fsopen": "430, b'tmpfs', 0",
        "open_tree": "428, -100, b'/', 1",
        "mount_setattr": "442, -100, b'/', 0, 0, 0",
        "pidfd_getfd": "438, 0, 0, 0",
        "kcmp": "312, 1, 1, 0, 0, 0",
        "settimeofday": "164, bytes(16), 0",
        "move_pages": "279, 0, 0, 0, 0, 0, 0",
        "a call of the future": "1000, 0",
        "a 32-bit-pointer call": "0x40000000 + 101, 0, 0, 0, 0",
        "clone into a user namespace": "56, 0x10000011, 0, 0, 0, 0",
        "thread in a namespace": "56, 0x10010f00, 0, 0, 0, 0",
    }
    return [_refused("kernel", f"call({args})  # {name}") for name, args in numbers.items()]


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
             "error|crashed"),
        Case("forgery", "import gc, socket\nprint([o for o in gc.get_objects()"
             " if isinstance(o, socket.socket) and o.fileno() > 2 and o.getpeername()])",
             "ok|error"),
        Case("forgery", "import sys\nframe = sys._getframe()\nwhile frame.f_back:"
             " frame = frame.f_back\nprint(sorted(frame.f_locals)[:0])", "ok", "[]\n"),
        Case("forgery", "import os\nos.write(2, b'MemoryError\\n')\nos._exit(0)", "ok"),
        Case("forgery", "import os\nos.write(1, b'timeout')\nos._exit(124)", "error"),
    ]  # fmt: skip


def _traces() -> list[Case]:
    """Pairs: the first leaves something, the second (in any worker) looks for it."""
    pairs = [
        ("import math\nmath.pi = 3", "import math\nprint(math.pi == 3)"),
        ("import builtins\nbuiltins.left = 1", "print('left' in dir(__builtins__))"),
        ("import os\nos.environ['LEFT'] = '1'", "import os\nprint('LEFT' in os.environ)"),
        ("import sys\nsys.left = 1", "import sys\nprint(hasattr(sys, 'left'))"),
        ("import sympy\nsympy.pi = 3", "import sympy\nprint(sympy.pi == 3)"),
        ("import numpy\nnumpy.seterr(all='raise')", "import numpy\nprint(False)"),
        ("import os\nos.umask(0o777)", "import os\nprint(os.umask(0) == 0o777)"),
        (
            "import sys\nsys.setrecursionlimit(50)",
            "import sys\nprint(sys.getrecursionlimit() < 99)",
        ),
    ]
    files = [
        ("open('/tmp/left', 'w').close()", "import os\nprint(os.path.exists('/tmp/left'))"),
        ("open('/dev/shm/left', 'w').close()", "import os\nprint(os.path.exists('/dev/shm/left'))"),
    ]
    return [
        case
        for needs, group in (("", pairs), ("files", files))
        for first, second in group
        for case in (Case("trace", first, "ok", needs=needs), Case("trace", second, "ok", "False"))
    ]


_LACKS = {"namespaces": (), "namespaces-flat": ("namespace",), "landlock": ("files", "namespace")}


def run(sandbox: Sandbox, num_endless: int = 100) -> list[dict[str, str]]:
    """Runs all that the sandbox's rung can run; returns what went wrong.

    Args:
      num_endless: at most so many of the programs that take the whole time limit.
    """
    todo = [case for case in cases() if case.needs not in _LACKS[sandbox.rung]]
    endless = [case for case in todo if case.kind == "time"]
    todo = [case for case in todo if case not in endless[num_endless:]]
    futures = [sandbox.submit(case.code) for case in todo]
    faults = []
    for case, future in zip(todo, futures, strict=True):
        if fault := case.fault(future.result(120)):
            faults.append({"kind": case.kind, "code": case.code[-300:], "fault": fault})
    return faults


if __name__ == "__main__":
    rung, num_workers, num_endless = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with Sandbox(LIMITS, num_workers, isolation=rung) as sandbox:
        report = {"rung": sandbox.rung, "user": os.geteuid(), "num_cases": len(cases())}
        print(json.dumps(report | {"faults": run(sandbox, num_endless)}))
