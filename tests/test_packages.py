"""The environment that programs run on: what is in it, what is not, and how it is built."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import numpy
import pytest

from cir_jax.cli import main
from cir_jax.config import SandboxConfig
from cir_jax.sandbox import packages
from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.pool import open_sandbox
from cir_jax.sandbox.runtime import LIBRARIES, Runtime

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sandbox():
    with open_sandbox(SandboxConfig(num_workers=1)) as sandbox:
        yield sandbox


def printed(sandbox, code):
    result = sandbox.submit(code).result()
    assert result.status == "ok", result
    return json.loads(result.stdout)


def test_lock_pins_the_libraries_and_nothing_else():
    assert set(packages.locked_versions()) == set(LIBRARIES)
    pinned = packages.LOCK.read_text().replace("\\\n", " ").splitlines()
    for line in pinned:
        if line.strip() and not line.lstrip().startswith("#"):
            assert "==" in line and "--hash=sha256:" in line


def test_programs_have_the_pinned_versions(sandbox):
    code = (
        "import importlib, json\n"
        f"modules = [importlib.import_module(name) for name in {LIBRARIES}]\n"
        "print(json.dumps([(m.__name__, m.__version__, m.__file__) for m in modules]))"
    )
    folder = packages.find("").folder
    seen = printed(sandbox, code)
    assert {name: version for name, version, _ in seen} == packages.locked_versions()
    assert all(path.startswith(folder) for _, _, path in seen)


def test_programs_have_nothing_of_the_trainers(sandbox):
    trainers = [
        sysconfig.get_path("purelib"),
        os.path.dirname(os.path.dirname(numpy.__file__)),
        str(ROOT),
    ]
    base = f"{sys.base_prefix}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    names = ("jax", "flax", "pydantic", "transformers", "cir_jax", "pip", "setuptools")
    code = (
        "import importlib.util, json, os, sys\n"
        f"found = [name for name in {names} if importlib.util.find_spec(name)]\n"
        f"seen = [p for p in {trainers} if os.path.exists(p) and os.listdir(p)]\n"
        f"base = os.listdir({base!r}) if os.path.isdir({base!r}) else []\n"
        "print(json.dumps([found, seen, base, [p for p in sys.path if not os.path.exists(p)]]))"
    )
    found, seen, of_base, gone = printed(sandbox, code)
    assert found == seen == of_base == []
    assert all(path.endswith(".zip") for path in gone)  # the standard library's, never there


def test_it_cannot_be_written_to(sandbox):
    code = f"open({packages.find('').folder + '/new'!r}, 'w')"
    assert "Read-only" in sandbox.submit(code).result().error


def test_trainers_packages_if_asked_for():
    found = packages.find("trainer")
    assert (found.interpreter, found.folder, found.lock) == (sys.executable, "", "")
    assert found.versions["numpy"] == numpy.__version__
    assert found.digest != packages.find("").digest


def test_hidden_folders_are_left_out(tmp_path):
    for name in ("bin/python", "lib/a.so", "lib/python3/os.py", "lib/python3/site/secret"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "lib/loop").symlink_to(".")
    (tmp_path / "lib/back").symlink_to("python3/site")
    runtime = Runtime((str(tmp_path),), (str(tmp_path / "lib/python3/site"),))
    whole, partial = runtime.parts()
    assert whole == {str(tmp_path / name) for name in ("bin", "lib/a.so", "lib/python3/os.py")}
    assert partial == {str(tmp_path / name) for name in ("", "lib", "lib/python3")}
    assert Runtime((str(tmp_path),)).parts() == ({str(tmp_path)}, set())


# --- building; a real one takes half a minute, so that most of it is replaced


def fill(folder):
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(sys.executable)
    marker = {"lock": packages.lock_hash(), "python": "3", "machine": "m", "versions": {"a": "1"}}
    (folder / "runtime.json").write_text(json.dumps(marker))


def test_only_one_of_several_builds(tmp_path, monkeypatch):
    others_wait, filled, said = threading.Event(), [], []

    def slow_fill(folder):
        filled.append(folder)
        assert others_wait.wait(30)
        fill(folder)

    def say(text):
        said.append(text)
        if "waiting" in text:
            others_wait.set()

    monkeypatch.setattr(packages, "_fill", slow_fill)
    found = []
    folder = str(tmp_path / "new/runtime")
    threads = [
        threading.Thread(target=lambda: found.append(packages.find(folder, say))) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(filled) == 1 and len(found) == 2 and found[0] == found[1]
    assert found[0].interpreter == f"{folder}/bin/python"
    assert sorted(text.split()[0] for text in said[:2]) == ["another", "building"]
    assert said[2].startswith("built in ") and len(said) == 3
    packages.find(folder, say)
    assert len(filled) == 1


def test_a_killed_build_leaves_nothing_that_counts(tmp_path, monkeypatch):
    folder = tmp_path / "runtime"
    script = (
        "import os, signal, sys, test_packages\n"
        "from cir_jax.sandbox import packages\n"
        "def die(folder):\n"
        "    test_packages.fill(folder)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "packages._fill = die\n"
        "packages.find(sys.argv[1])\n"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", script, folder], env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not folder.exists() and os.listdir(tmp_path)
    monkeypatch.setattr(packages, "_fill", fill)
    assert packages.find(str(folder), print).versions == {"a": "1"}
    assert not [name for name in os.listdir(tmp_path) if "unfinished" in name]


def test_without_an_index_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(os.path.dirname(numpy.__file__)))
    assert main(["build-runtime", str(tmp_path / "runtime")]) == 2
    err = capsys.readouterr().err
    assert "building the environment" in err and "pip failed" in err
    assert "PIP_FIND_LINKS" in err and "sandbox.runtime=trainer" in err and "Traceback" not in err
    assert os.listdir(tmp_path) == ["runtime.lock"]


def test_a_directory_with_something_else_stays_as_it_is(tmp_path):
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime/thesis").write_text("mine")
    with pytest.raises(SandboxError, match="sandbox.runtime='.*': holds something else"):
        packages.find(str(tmp_path / "runtime"))
    assert os.listdir(tmp_path / "runtime") == ["thesis"]
    with pytest.raises(SandboxError, match="sandbox.runtime='.*thesis/x': .*File exists"):
        packages.find(str(tmp_path / "runtime/thesis/x"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, marker: marker.update(lock="0" * 64), "from the lock file 000000000000"),
        (lambda folder, marker: marker.pop("versions"), "cannot be read"),
        (lambda folder, marker: (folder / "bin/python").unlink(), "its python, .* is not there"),
    ],
)
def test_what_no_longer_fits_is_refused(tmp_path, change, message):
    fill(tmp_path)
    marker = json.loads((tmp_path / "runtime.json").read_text())
    change(tmp_path, marker)
    (tmp_path / "runtime.json").write_text(json.dumps(marker))
    with pytest.raises(SandboxError, match=message):
        packages.find(str(tmp_path))


def test_command_prints_the_directory(capsys):
    assert main(["build-runtime"]) == 0
    assert capsys.readouterr().out == f"{packages.default_folder()}\n"
