"""Ordinary programs come out as plain python has it, byte for byte, in any worker and order."""

import subprocess
import sys

import programs
import pytest

from cir_jax.sandbox.environment import ENVIRONMENT
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.outcome import last_line, outcome
from cir_jax.sandbox.pool import Sandbox

KINDS = programs.by_kind()
# An interpreter takes a second to import what some need: so the usual run has one of each kind.
SAMPLE = [codes[len(codes) // 2] for codes in KINDS.values()] + KINDS["errors"][::15]


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(Limits(timeout_s=30), num_workers=2) as sandbox:
        yield sandbox


def of_plain_python(code, folder):
    (folder / "main.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "main.py"],
        cwd=folder,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    error = last_line(done.stderr)
    return outcome(done.returncode, done.stdout.decode(), error, 0, in_time=True, oom_killed=False)


CASES = [
    pytest.param(
        kind, code, marks=() if code in SAMPLE else pytest.mark.slow, id=f"{kind} {number}"
    )
    for kind, codes in KINDS.items()
    for number, code in enumerate(codes)
]


@pytest.mark.parametrize(("kind", "code"), CASES)
def test_equals_plain_python(sandbox, tmp_path, kind, code):
    ours, plain = sandbox.submit(code).result(60), of_plain_python(code, tmp_path)
    assert plain.status == "ok" or kind == "errors"
    assert (ours.status, ours.stdout, ours.error) == (plain.status, plain.stdout, plain.error)


def test_there_are_many():
    codes = [code for codes in KINDS.values() for code in codes]
    assert len(codes) == len(set(codes)) >= 200 and len(KINDS) >= 10
    assert 20 <= len(set(SAMPLE)) <= 30


def test_order_and_worker_change_nothing(sandbox):
    def results(codes):
        done = [sandbox.submit(code).result(60) for code in codes]
        return {code: (r.status, r.stdout, r.error) for code, r in zip(codes, done, strict=True)}

    assert results(SAMPLE) == results(SAMPLE[::-1])
