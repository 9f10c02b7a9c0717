"""The drill finds what is wrong; some of its faults for real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cir_jax import cli, exits
from cir_jax.drill import bench as benches
from cir_jax.drill import faults
from cir_jax.drill.bench import Bench, Ended

ROOT = Path(__file__).parent.parent


class FakeBench(Bench):
    """Whose next start ends as told."""

    def __init__(self, folder, ended, different=""):
        self.scratch, self.every, self._different = folder, 2, different
        self._count, self.num_processes = 0, 1
        self._ended = ended

    def run(self, run_dir, *overrides, inject="none"):
        return self._ended

    def same_as_baseline(self, run_dir):
        return self._different


def ended(code, steps, resumed=None):
    return Ended([code], "the end", steps, resumed, 1.0)


@pytest.mark.parametrize(
    "first, second, different, wrong",
    [
        (ended(143, 5), ended(0, 8, 4), "", None),
        (ended(137, 5), ended(0, 8, 4), "", "exit code 137, expected 143"),
        (ended(143, 5), ended(1, 5, 4), "", "resumed, exit code 1"),
        (ended(143, 5), ended(0, 8, 4), "metrics differ", "metrics differ"),
        (ended(143, 5), ended(0, 8, 2), "", "3 steps lost, at most 2 expected"),
        (ended(143, 5), ended(0, 8, None), "", "5 steps lost"),
    ],
)
def test_an_end_that_is_not_as_expected_is_wrong(tmp_path, first, second, different, wrong):
    bench = FakeBench(tmp_path, second, different)
    out = faults._goes_on(bench, first, tmp_path, exits.TERMINATED)
    assert bool(out.wrong) == (wrong is not None)
    assert wrong is None or wrong in out.wrong[0]


def test_what_stays_behind_is_found(tmp_path):
    """In a process of its own: it adopts what its children leave."""
    code = (
        "import subprocess, sys, pathlib\n"
        "from cir_jax.drill import bench as benches\n"
        "from cir_jax.drill.bench import Bench\n"
        "benches._ORPHANS_GONE_S = 1.5\n"
        "benches.adopt_orphans()\n"
        "subprocess.run(['sh', '-c', 'setsid sleep 61 >/dev/null 2>&1 &'], check=True)\n"
        "run = pathlib.Path(sys.argv[1])\n"
        # One without a command line, as one has that is about to run another program.
        "nameless = 'mkfifo f; (exec -a \"\" cat <>f >/dev/null 2>&1 &)'\n"
        "subprocess.run(['bash', '-c', nameless], cwd=run, check=True)\n"
        "bench = Bench.__new__(Bench)\n"
        "bench.scratch = run\n"
        "(run / 'temp').mkdir()\n"
        "(run / 'temp/lost').touch()\n"
        "(run / 'config.json.tmp').touch()\n"
        "print(*bench.left_over(run), sep='\\n')\n"
        "print('then', *bench.left_over(run), sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    before, after = done.stdout.split("then")
    assert "sleep 61" in before and "config.json.tmp" in before and "temp/lost" in before
    assert before.count("process ") == 2
    assert "process " not in after and "temp/lost" not in after


def test_names_and_unknown_ones(capsys):
    assert cli.main(["drill", "--list", "--only", "kill -9 of"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert cli.main(["drill", "--only", "earthquake"]) == cli.EXIT_CONFIG
    assert "earthquake" in capsys.readouterr().err


def test_damages_damage(tmp_path):
    """Each changes what is there."""
    for number, damage in enumerate(
        (faults.truncate, faults.flip_bit, faults.empty, faults.lose_item)
    ):
        folder = tmp_path / str(number)
        (folder / "state").mkdir(parents=True)
        (folder / "state/data").write_bytes(bytes(range(100)))
        damage(folder)
        data = folder / "state/data"
        assert not data.exists() or data.read_bytes() != bytes(range(100))
        assert folder.exists()


@pytest.mark.slow
def test_killed_ten_times_a_run_is_the_same():
    """And a flipped bit, and what SIGTERM leaves; every line of the table is as expected."""
    only = ("--only", "random", "--only", "flipped", "--only", "SIGTERM")
    done = subprocess.run(
        [sys.executable, "-m", "cir_jax.cli", "drill", *only, "--kills", "10", "rl.steps=40"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 10 times" in done.stdout and "WRONG" not in done.stdout
    assert benches.CHECKPOINTS not in done.stdout
