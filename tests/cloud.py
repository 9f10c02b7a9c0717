"""A cloud for launcher tests: the fake gcloud first on PATH, and what it was asked for."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tpu_scripts"
POLL = "0.05"
SLICE = ("--name=a", "--zone=us-a")
REQUEST = (*SLICE, "--type=v5litepod-1", "--spot", "--ttl=1h")


class Cloud:
    def __init__(self, tmp_path, **scenario):
        self.dir = tmp_path / "cloud"
        self.dir.mkdir()
        programs = tmp_path / "bin"
        programs.mkdir()
        (programs / "gcloud").symlink_to(ROOT / "tests/fake_gcloud.py")
        # What workers run needs no more of the checkout than this.
        self.source = tmp_path / "source"
        shutil.copytree(SCRIPTS, self.source / "tpu_scripts")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("CIR_", "JAX", "XLA"))}
        # Without the packages of this environment, as on most machines that launch; and quicker.
        python = programs / "python-alone"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        python.chmod(0o755)
        self.env |= {
            "PATH": f"{programs}:/usr/bin:/bin:{os.environ['PATH']}",
            "FAKE_GCLOUD": str(self.dir),
            "USER": "Ada.L",
            "CIR_POLL": POLL,
            "CIR_BACKOFF": POLL,
            "CIR_LAUNCH_PYTHON": str(python),
            "CIR_SOURCE": str(self.source),
        }
        self.play(**scenario)

    def play(self, **scenario):
        (self.dir / "scenario.json").write_text(json.dumps(scenario))

    def command(self, script, *words):
        return ["bash", str(SCRIPTS / f"{script}.sh"), *words]

    def run(self, script, *words, code=0, **env):
        """Runs a script to its end and checks the exit code."""
        done = subprocess.run(
            self.command(script, *words),
            env=self.env | env,
            cwd=self.dir.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert code is None or done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def begin(self, script, *words):
        return subprocess.Popen(
            self.command(script, *words),
            env=self.env,
            cwd=self.dir.parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def calls(self, verb=None):
        path = self.dir / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        calls = [json.loads(line) for line in lines]
        return [call for call in calls if verb in (None, call["verb"])]

    def verbs(self):
        """The verbs of all calls, equal ones in a row once."""
        verbs = [call["verb"] for call in self.calls()]
        return [v for i, v in enumerate(verbs) if i == 0 or verbs[i - 1] != v]

    def changes(self):
        return [c["verb"] for c in self.calls() if c["verb"] in ("create", "delete", "scp")]

    def slices(self):
        return sorted(path.parent.name for path in self.dir.glob("slices/*/slice.json"))

    def home(self, worker=0, name="a"):
        return self.dir / "slices" / name / f"w{worker}"

    def processes(self, program):
        """Processes of this cloud's workers whose command line begins like that."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes()
                words = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if f"FAKE_VM={self.dir}/".encode() in environment and words.startswith(
                program.encode()
            ):
                found.append(int(path.name))
        return found

    def end(self):
        """Nothing that a test began outlives it."""
        for process in self.processes(""):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
