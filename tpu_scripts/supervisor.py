"""Runs one program of one run on one worker: starts it, restarts it, ends all that it began.

It needs Python 3.9 and Linux, nothing else, and is what tpu_scripts/*.sh talk to over ssh. Each
command prints one marker line, `CIR worker=3 tag=status state=running ...`, since what gcloud says
of several workers is no evidence. State is in HOME/runs/RUN/worker-N: `status.json` (replaced by
rename), `log`, and two locks. Whoever holds `alive.lock` is the supervisor, so no recorded process
id can be mistaken for it.

Exit codes of the program, as the trainer documents them:
  0 done · 2, 64, 65, 76, 78 somebody has to change something: never again · 130 interrupted
  143 pre-empted: not again here
  all others: again, while no more than `--retries` attempts in a row made no newer checkpoint
"""

import argparse
import ctypes
import fcntl
import glob
import hashlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

USER_ERRORS = (2, 64, 65, 76, 78)
INTERRUPTED, PREEMPTED = 130, 143
ENDED = ("done", "failed", "stopped", "preempted", "interrupted")
OWNER = "CIR_SUPERVISED"  # environment variable that all processes of a run carry
_SUBREAPER, _DEATH_SIGNAL = 36, 1  # prctl
_MOST_BACKOFF_S = 60.0
_MIRROR_EVERY_S = 60.0
_TAIL_BYTES = 100_000
_SYNC = ("gcloud", "storage", "rsync", "--recursive", "--exclude=checkpoints/.*")


class Place:
    """The directory of a run on this worker."""

    def __init__(self, home, run, worker):
        self.run, self.worker = run, worker
        self.dir = os.path.join(os.path.expanduser(home), "runs", run, f"worker-{worker}")
        os.makedirs(self.dir, exist_ok=True)

    def path(self, name):
        return os.path.join(self.dir, name)

    def read(self):
        """The last status; {} if there is none."""
        try:
            with open(self.path("status.json"), encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return {}

    def write(self, status):
        temporary = self.path(f"status.json.{os.getpid()}.{threading.get_ident()}")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(status, file, indent=1)
        os.replace(temporary, self.path("status.json"))

    def lock(self, name, wait):
        """The open file that holds a lock, or None if another process has it."""
        file = open(self.path(name), "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            file.close()
            return None
        return file

    def alive(self):
        """Whether a supervisor looks after the run."""
        file = self.lock("alive.lock", wait=False)
        if file:
            file.close()
        return file is None

    def mark(self, tag, **fields):
        words = (f"{key}={_word(value)}" for key, value in fields.items())
        print(f"CIR worker={self.worker} tag={tag}", *words, flush=True)


def _word(value):
    """A value without blanks, so that a marker's words can be told apart."""
    return re.sub(r"[^\w./:+,@%-]+", "_", str(value))[:200] if value not in (None, "") else "-"


# -- processes ---------------------------------------------------------------------------------


_LIBC = ctypes.CDLL(None)  # here, since a forked child should not load anything


def _prctl(option, value):
    _LIBC.prctl(option, value, 0, 0, 0)


def _processes():
    """Process id -> parent's id, of all that live."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except (OSError, ValueError):
                continue
            if state != b"Z":
                found[int(name)] = int(parent)
    return found


def _descendants(roots, processes):
    found, todo = set(), set(roots)
    while todo:
        todo = {p for p, parent in processes.items() if parent in todo} - found
        found |= todo
    return found


def _carrying(owner):
    """Processes of a run whose supervisor is gone, by their environment."""
    wanted = f"{OWNER}={owner}".encode()
    found = set()
    for process in _processes():
        try:
            with open(f"/proc/{process}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    found.add(process)
        except OSError:
            continue
    return found - {os.getpid()}


def _signal(processes, number):
    for process in processes:
        try:
            os.kill(process, number)
        except (ProcessLookupError, PermissionError):
            pass


def _kill_all(find):
    """Kills what `find` finds until it finds nothing; for at most 10 s."""
    end = time.monotonic() + 10
    while (left := find()) and time.monotonic() < end:
        _signal(left, signal.SIGKILL)
        _reap()
        time.sleep(0.01)


def _kill_descendants():
    """All of them are children of ours in the end: this process is their subreaper."""
    _kill_all(lambda: _descendants({os.getpid()}, _processes()))


def _reap():
    """Collects every child that has ended: process id -> exit code as a shell gives it."""
    ended = {}
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if process == 0:
            return ended
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        ended[process] = code


def _remove_stale_tpu_lock(path="/tmp/libtpu_lockfile"):
    """A crashed process leaves libtpu's lock; it goes if no process has a TPU open."""
    if not os.path.exists(path):
        return
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            if re.match(r"/dev/(accel|vfio/)", os.readlink(link)):
                return
        except OSError:
            continue
    try:
        os.remove(path)
    except OSError:
        pass


# -- what the program has done -----------------------------------------------------------------


def newest_checkpoint(folder):
    """Number of the newest complete checkpoint in a directory, local or gs://; -1 if none."""
    if folder.startswith("gs://"):
        listing = _quiet(["gcloud", "storage", "ls", folder.rstrip("/") + "/"])
        names = [line.rstrip("/").rpartition("/")[2] for line in listing.splitlines()]
    else:
        try:
            names = os.listdir(folder)
        except OSError:
            names = []
    return max((int(name) for name in names if name.isdigit()), default=-1)


def _quiet(command, timeout_s=60):
    """A command's output; empty if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def progress(place, run_dir):
    """Phase and step that the program has reached, and seconds since it last wrote anything."""
    log, metrics = place.path("log"), os.path.join(run_dir or "/nonexistent", "metrics.jsonl")
    times = [os.path.getmtime(path) for path in (log, metrics) if os.path.exists(path)]
    age = int(max(0.0, time.time() - max(times))) if times else None
    for line in reversed(_tail(metrics, 20_000).splitlines()):
        try:
            record = json.loads(line)
            return record["kind"], record["step"], age
        except (ValueError, KeyError, TypeError):
            continue
    steps = re.findall(r"^(\w+) (\d+)/\d+ ", _tail(log, 20_000), re.MULTILINE)
    return (*(steps[-1] if steps else (None, None)), age)


def _tail(path, size):
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - size))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


# -- the supervisor itself ---------------------------------------------------------------------


class Supervisor:
    def __init__(self, place, spec):
        self.place, self.spec = place, spec
        self.status = {"worker": place.worker, "state": "running", "pid": os.getpid()}
        self.status |= {"started": time.time(), "command": spec["digest"], "code_sha": spec["sha"]}
        self.status |= {"run_dir": spec["run_dir"], "checkpoints": spec["checkpoints"]}
        self.asked = None  # the signal that asked for an end
        self.asked_at = 0.0

    def main(self):
        _prctl(_SUBREAPER, 1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask)
        if self.spec["bucket"]:
            threading.Thread(target=self._mirror_often, daemon=True).start()
        failures, attempt = 0, 0
        # Processes of a run look whether all of them see it.
        os.makedirs(self.spec["run_dir"], exist_ok=True)
        reached = newest_checkpoint(self.spec["checkpoints"])
        while True:
            attempt += 1
            self._note(state="running", attempt=attempt, code=None)
            code = self._attempt(attempt)
            newest = newest_checkpoint(self.spec["checkpoints"])
            failures = 1 if newest > reached else failures + 1
            reached = max(reached, newest)
            state = self._verdict(code, failures)
            self._note(state=state, code=code, failures=failures, checkpoint=reached)
            if state != "retrying":
                break
            delay = min(_MOST_BACKOFF_S, self.spec["backoff"] * 2 ** (failures - 1))
            if self._pause(delay * random.uniform(0.75, 1.25)):
                self._note(state="stopped" if self._stop_asked() else "preempted")
                break
        self._mirror()

    def _verdict(self, code, failures):
        if code == 0:
            return "done"
        if self._stop_asked():
            return "stopped"
        if code in USER_ERRORS:
            return "failed"
        if code == PREEMPTED or self.asked:
            return "preempted"
        if code == INTERRUPTED:
            return "interrupted"
        return "retrying" if failures <= self.spec["retries"] else "failed"

    def _stop_asked(self):
        return os.path.exists(self.place.path("stop"))

    def _attempt(self, attempt):
        """One start of the program, to its end and that of all processes it left: its code."""
        _remove_stale_tpu_lock()
        environment = dict(os.environ, **self.spec["env"])
        environment[OWNER] = self.place.dir
        environment["CIR_ATTEMPT"] = str(attempt)
        with open(self.place.path("log"), "ab", buffering=0) as log:
            words = " ".join(shlex.quote(word) for word in self.spec["words"])
            log.write(f"== worker {self.place.worker}, attempt {attempt}: {words}\n".encode())
            if self.asked:
                return 128 + self.asked
            parent = os.getpid()
            try:
                child = subprocess.Popen(
                    self.spec["words"],
                    cwd=self.spec["cwd"],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=lambda: _die_with(parent),
                )
            except OSError as error:
                log.write(f"cannot start: {error}\n".encode())
                return 78
            self._note(child=child.pid)
            code = self._wait(child.pid)
            child.returncode = code  # collected here, not by Popen
            _kill_descendants()
            log.write(
                f"== worker {self.place.worker}, attempt {attempt}: exit code {code}\n".encode()
            )
        return code

    def _wait(self, child):
        passed, killed = False, False
        while True:
            ended = _reap()
            if child in ended:
                return ended[child]
            if self.asked and not passed:
                _signal({child}, signal.SIGTERM)
                passed = True
            if passed and not killed and time.monotonic() - self.asked_at > self.spec["grace"]:
                _signal({child}, signal.SIGKILL)
                killed = True
            self._pause(self.spec["poll"], always=passed)

    def _pause(self, seconds, always=False):
        """Waits, but not once an end is asked for, unless `always`; True if it is."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and (always or not self.asked):
            time.sleep(min(0.2, self.spec["poll"], max(0.0, end - time.monotonic())))
        return bool(self.asked)

    def _ask(self, number, _frame):
        if not self.asked:
            self.asked, self.asked_at = number, time.monotonic()

    def _note(self, **fields):
        self.status |= fields
        self.status["updated"] = time.time()
        self.place.write(self.status)

    def _mirror_often(self):
        while True:
            time.sleep(_MIRROR_EVERY_S)
            self._mirror()

    def _mirror(self):
        """Copies status, log's end and run directory to the bucket, for when the slice is gone."""
        if not self.spec["bucket"]:
            return
        tail = self.place.path("log.tail")
        with open(tail, "w", encoding="utf-8") as file:
            file.write(_tail(self.place.path("log"), _TAIL_BYTES))
        target = f"{self._kept()}/worker-{self.place.worker}/"
        _quiet(["gcloud", "storage", "cp", self.place.path("status.json"), tail, target])
        if self.place.worker == 0 and os.path.isdir(self.spec["run_dir"]):
            # Each slice has a folder of its own. It is not brought back to the next slice: the
            # trainer goes on without its files, but takes shorter ones for damage.
            part = int(os.stat(self.place.path("start.lock")).st_mtime)
            _quiet([*_SYNC, self.spec["run_dir"], f"{self._kept()}/run/{part}"], timeout_s=600)

    def _kept(self):
        return f"{self.spec['bucket'].rstrip('/')}/{self.place.run}"


def _die_with(parent):
    """In the child: it gets SIGKILL when the supervisor ends, even by SIGKILL."""
    _prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(137)


def _daemon(run, log):
    """Runs `run` in a process that has nothing to do with this one any more; returns its id."""
    read, write = os.pipe()
    first = os.fork()
    if first:
        os.close(write)
        os.waitpid(first, 0)
        with os.fdopen(read) as pipe:
            return int(pipe.read() or 0)
    try:
        os.setsid()
        second = os.fork()
        if second:
            os.write(write, str(second).encode())
            os._exit(0)
        os.close(read)
        os.close(write)
        null, out = (
            os.open(os.devnull, os.O_RDWR),
            os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT),
        )
        for target, source in enumerate((null, out, out)):
            os.dup2(source, target)
        # What ssh or the caller had open here must not stay open: it would wait for us.
        os.closerange(3, 256)
        run()
        os._exit(0)
    except BaseException:  # a forked process must never return into its parent's code
        import traceback

        traceback.print_exc()
        os._exit(70)


# -- commands ----------------------------------------------------------------------------------


def start(args):
    place = Place(args.home, args.run, args.worker)
    env = _environment(args)
    told = json.dumps([args.words, args.sha])
    digest = hashlib.sha256(told.encode()).hexdigest()[:12]
    with place.lock("start.lock", wait=True):
        status = place.read()
        if place.alive():
            same = status.get("command") == digest
            place.mark("start", state="running" if same else "other", pid=status.get("pid"))
            return 0
        ended_so = status.get("state") if status.get("command") == digest else None
        # What is done stays done, and the user's error stays one until the command or code changes.
        if not args.again and (
            ended_so == "done" or (ended_so == "failed" and status.get("code") in USER_ERRORS)
        ):
            place.mark("start", state=ended_so, code=status.get("code"))
            return 0
        _kill_all(lambda: _carrying(place.dir))
        if os.path.exists(place.path("stop")):
            os.remove(place.path("stop"))
        cwd = os.path.expanduser(args.cwd) if args.cwd else os.getcwd()
        spec = {
            "words": args.words,
            "digest": digest,
            "sha": args.sha,
            "env": env,
            "cwd": cwd,
            "run_dir": os.path.join(cwd, args.run_dir),
            "checkpoints": _within(
                cwd, args.checkpoints or os.path.join(args.run_dir, "checkpoints")
            ),
            "bucket": args.bucket,
            "retries": args.retries,
            "backoff": args.backoff,
            "poll": args.poll,
            "grace": args.grace,
        }
        place.write({"worker": args.worker, "state": "starting", "command": digest})

        def run():
            lock = place.lock("alive.lock", wait=True)
            Supervisor(place, spec).main()
            lock.close()

        pid = _daemon(run, place.path("supervisor.log"))
        end = time.monotonic() + 10
        while place.read().get("state") == "starting" and time.monotonic() < end:
            time.sleep(0.005)
        place.mark("start", state="started", pid=pid, sha=args.sha)
    return 0


def _within(folder, path):
    return path if "://" in path else os.path.join(folder, path)


def _environment(args):
    """Of --env and --env-file; a search path's first part is where the code's programs are."""
    pairs = list(args.env)
    if args.env_file:
        with open(os.path.expanduser(args.env_file), encoding="utf-8") as file:
            pairs += [line.strip() for line in file if "=" in line and line[0] != "#"]
    env = dict(pair.split("=", 1) for pair in pairs)
    if args.bin:
        path = os.path.expanduser(args.bin)
        env["PATH"] = path + os.pathsep + os.environ.get("PATH", os.defpath)
    return env


def status(args):
    place = Place(args.home, args.run, args.worker)
    seen = place.read()
    state = seen.get("state", "none")
    if state not in (*ENDED, "none") and not place.alive():
        state = "lost"  # the supervisor was killed
    run_dir = seen.get("run_dir")
    phase, step, age = progress(place, run_dir)
    place.mark(
        "status",
        state=state,
        code=seen.get("code"),
        attempt=seen.get("attempt"),
        phase=phase,
        step=step,
        checkpoint=newest_checkpoint(seen["checkpoints"]) if "checkpoints" in seen else None,
        age=age,
    )
    return 0


def logs(args):
    """The log from a byte on, below a marker that says where the next call goes on."""
    place = Place(args.home, args.run, args.worker)
    try:
        size = os.path.getsize(place.path("log"))
    except OSError:
        size = 0
    first = args.since if args.since >= 0 else max(0, size - args.tail)
    if first > size:  # another log than the one that was read before
        first = 0
    text = b""
    if size:
        with open(place.path("log"), "rb") as file:
            file.seek(first)
            text = file.read(args.most)
    place.mark("logs", next=first + len(text))
    sys.stdout.flush()
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()
    return 0


def stop(args):
    """SIGTERM, wait, SIGKILL: on return nothing of the run lives."""
    place = Place(args.home, args.run, args.worker)
    with open(place.path("stop"), "w"):
        pass
    if not place.alive():
        _kill_all(lambda: _carrying(place.dir))
        seen = place.read()
        if seen and seen.get("state") not in ENDED:
            place.write(seen | {"state": "stopped"})
        place.mark("stop", state=place.read().get("state", "none"))
        return 0
    pid = place.read().get("pid")
    end = time.monotonic() + args.grace
    _signal({pid} if pid else (), signal.SIGTERM)
    while place.alive() and time.monotonic() < end:
        time.sleep(min(0.2, args.poll))
    if place.alive():
        _kill_all(lambda: ({pid} if place.alive() else set()) | _carrying(place.dir))
        place.write(place.read() | {"state": "stopped", "code": 137})
    _kill_all(lambda: _carrying(place.dir))
    place.mark("stop", state=place.read().get("state", "none"), code=place.read().get("code"))
    return 0


def guard(args):
    """Leaves a process behind that gives the slice back when its time is over."""
    place = Place(args.home, ".guard", args.worker)

    def run():
        lock = place.lock("alive.lock", wait=False)
        if lock is None:
            return  # one is enough
        while time.time() < args.expires:
            time.sleep(min(args.poll, max(0.01, args.expires - time.time())))
        for attempt in range(100):
            if subprocess.run(args.words, stdin=subprocess.DEVNULL).returncode == 0:
                break
            time.sleep(min(600, args.poll * 2**attempt))
        lock.close()

    if not place.alive():
        _daemon(run, place.path("log"))
    place.mark("guard", state="set", expires=args.expires)
    return 0


def main():
    parser = argparse.ArgumentParser(
        usage="%(prog)s VERB [options] [-- COMMAND ...]", description=__doc__.splitlines()[0]
    )
    parser.add_argument("verb", choices=("start", "status", "logs", "stop", "guard"))
    parser.add_argument("--home", default="~/cir")
    parser.add_argument("--run", default="run")
    parser.add_argument("--worker", type=int, required=True)
    parser.add_argument("--sha", default="", help="of the code")
    parser.add_argument("--cwd", default="", help="where the program runs")
    parser.add_argument("--bin", default="", help="first directory to look for programs in")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--env-file", default="", help="such lines; for what must stay secret")
    parser.add_argument("--run-dir", default="", help="of the program, which runs in --cwd")
    parser.add_argument("--checkpoints", default="", help="new ones of which count as progress")
    parser.add_argument("--bucket", default="", help="where status and log are copied each minute")
    parser.add_argument("--retries", type=int, default=3, help="without a newer checkpoint")
    parser.add_argument("--backoff", type=float, default=2.0, help="seconds before the first")
    parser.add_argument("--poll", type=float, default=1.0, help="seconds between two looks")
    parser.add_argument(
        "--grace", type=float, default=120.0, help="seconds from SIGTERM to SIGKILL"
    )
    parser.add_argument("--again", action="store_true", help="also what is done or refused")
    parser.add_argument("--since", type=int, default=-1, help="first byte of the log")
    parser.add_argument("--tail", type=int, default=4000, help="bytes, without --since")
    parser.add_argument("--most", type=int, default=1_000_000, help="bytes at a time")
    parser.add_argument("--expires", type=float, default=0.0, help="seconds since 1970")
    # argparse's own idea of `--` depends on where options stand.
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    args.words = sys.argv[at + 1 :]
    if args.verb in ("start", "guard") and not args.words:
        parser.error(f"{args.verb}: expected -- COMMAND")
    return globals()[args.verb](args)


if __name__ == "__main__":
    sys.exit(main())
