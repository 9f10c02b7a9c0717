"""Many programs: nothing is lost, nothing stays."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.pool import Sandbox

HOSTILE = [
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "print('x' * 200_000)",
    "open('left', 'wb').write(bytes(10**6))\nopen('/dev/shm/left', 'w').close()",
    "import os\nos.kill(os.getpid(), 9)",
    "import os\nif os.fork() == 0:\n    os.setsid()\n    import time\n    time.sleep(1000)",
    "import os\nos.close(1)\nos._exit(3)",
]
BUSY = """\
import time
end = time.process_time() + 0.5
while time.process_time() < end: pass
print('done')
"""


def wait_for(condition, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def resident_bytes(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children(pids):
    """Direct children of the processes."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = Path(f"/proc/{name}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat.rpartition(")")[2].split()[1]) in pids:
                found.add(int(name))
    return found


def state(sandbox):
    """What must not grow: processes, this process's descriptors, mounts, files; and the sizes of
    the workers by process number."""
    guards = set(sandbox.stats()["pids"])
    zygotes = children(guards)
    time.sleep(0.3)  # a worker that has just replied makes a copy of itself for the next job
    return {
        # Numbers, not which ones: a worker is replaced after 5,000 programs.
        "processes": [len(guards), len(zygotes), len(children(zygotes))],
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mounts": len(Path("/proc/self/mounts").read_text().splitlines()),
        "shared memory": sorted(os.listdir("/dev/shm")),
        "zygote mounts": [
            len(Path(f"/proc/{pid}/mounts").read_text().splitlines()) for pid in sorted(zygotes)
        ],
    }, {pid: resident_bytes(pid) for pid in zygotes}


@pytest.mark.parametrize("num", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_nothing_stays(num):
    limits = Limits(timeout_s=1.0, allow_processes=True, output_bytes=2**16)
    with Sandbox(limits, num_workers=2) as sandbox:
        sandbox.wait_until_ready()
        for code in HOSTILE:
            sandbox.submit(code).result(60)
        before, sizes = state(sandbox)
        own = resident_bytes(os.getpid())
        draw = random.Random(0)
        # One in ten is hostile; the fork bomb takes a second, so it comes less often.
        for first in range(0, num, 200):
            futures = []
            for i in range(first, min(first + 200, num)):
                if i % 10:
                    futures.append((str(i), sandbox.submit(f"print({i})")))
                else:
                    code = HOSTILE[0] if i % 400 == 0 else draw.choice(HOSTILE[1:])
                    futures.append((None, sandbox.submit(code)))
            for want, future in futures:
                result = future.result(120)
                assert result.status != "infra"
                if want:
                    assert result.stdout == want + "\n"
        sandbox.wait_until_ready()
        after, grown = state(sandbox)
        assert after == before
        assert resident_bytes(os.getpid()) - own < 20 * 2**20
        assert all(grown[pid] - size < 5 * 2**20 for pid, size in sizes.items() if pid in grown)


@pytest.mark.parametrize(
    ("num", "num_kills"), [(150, 3), pytest.param(1000, 20, marks=pytest.mark.slow)]
)
def test_every_program_has_one_result_though_workers_are_killed(num, num_kills):
    with Sandbox(num_workers=2) as sandbox:
        sandbox.wait_until_ready()
        futures = [sandbox.submit(f"import time\ntime.sleep(.02)\nprint({i})") for i in range(num)]

        def kill():
            draw = random.Random(1)
            for i in range(num_kills):
                wait_for(lambda: sandbox.stats()["workers"], 60)
                guard = draw.choice(sandbox.stats()["pids"])
                inner = sorted(children({guard}))
                try:
                    os.kill(inner[0] if inner and i % 2 else guard, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                time.sleep(0.3)

        killer = threading.Thread(target=kill)
        killer.start()
        results = [future.result(180) for future in futures]
        killer.join()
        assert [(r.status, r.stdout) for r in results] == [("ok", f"{i}\n") for i in range(num)]
        assert sandbox.stats()["restarts"] >= num_kills - 1


@pytest.mark.parametrize("num", [8, pytest.param(128, marks=pytest.mark.slow)])
def test_no_false_timeouts(num):
    """Loops of half a second on two workers: in the queue no time limit runs."""
    with Sandbox(num_workers=2) as sandbox:
        futures = [sandbox.submit(BUSY) for _ in range(num)]
        assert [future.result(600).stdout for future in futures] == ["done\n"] * num
