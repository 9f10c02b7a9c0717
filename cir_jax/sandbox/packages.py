"""What programs can import: pinned packages in a virtual environment apart from the trainer's.

The environment is built on first use, by venv and pip, from the one lock file of this version: no
package but those in it, wheels only, each checked by its hash. A directory has its name only once
it is complete, so nothing that a killed build leaves can be taken for one; of several processes
that want it, one builds and the others wait.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.runtime import LIBRARIES

LOCK = Path(__file__).parent.parent / "assets" / "runtime" / "lock.txt"
TRAINERS = "trainer"
"""The setting that stands for the trainer's own packages."""

_MARKER = "runtime.json"
# A pip of the trainer's that was told these would install elsewhere, and a python that was told
# these would take the trainer's packages for the environment's.
_NOT_FOR_PIP = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
_SHOWN_LINES = 5

_CURE = """\
One of these helps:
- an index that pip can reach (PIP_INDEX_URL=...), or wheels fetched elsewhere with
    pip download --no-deps --require-hashes --only-binary :all: -r {lock} -d WHEELS
  and then PIP_NO_INDEX=1 PIP_FIND_LINKS=WHEELS;
- `cir-jax build-runtime DIR` on a machine with the same python at the same path, DIR copied here,
  and sandbox.runtime=DIR;
- sandbox.runtime={trainers}: programs use the trainer's own packages, and can read them all."""

Say = Callable[[str], None]


def _say(text: str) -> None:
    print(f"cir-jax: {text}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Packages:
    """What programs run on.

    folder: of the environment; "": the trainer's own. lock: SHA-256 of the lock file it was built
    from, or "". versions: by name, of the packages that matter to programs.
    """

    folder: str
    interpreter: str
    python: str
    machine: str
    lock: str
    versions: dict[str, str]

    def describe(self) -> dict[str, Any]:
        """For a run's records: all that may decide what a program prints."""
        return {
            "python": self.python,
            "machine": self.machine,
            "lock": self.lock,
            "versions": self.versions,
        }

    @property
    def digest(self) -> str:
        """Equal where programs print the same."""
        text = json.dumps(self.describe(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def find(setting: str, say: Say = _say) -> Packages:
    """Those that `sandbox.runtime` names, built first if they are not there yet.

    Raises:
      SandboxError: they can be neither found nor built; says what to do.
    """
    if setting == TRAINERS:
        return _trainers()
    folder = Path(setting).absolute() if setting else default_folder()
    if not (folder / _MARKER).is_file():
        build(folder, say)
    return _read(folder)


def default_folder() -> Path:
    """In the user's cache, by lock file, python and machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = f"{lock_hash()[:12]}-{platform.python_version()}-{platform.machine()}"
    return Path(cache, "cir_jax", "runtime", name)


def lock_hash() -> str:
    return hashlib.sha256(LOCK.read_bytes()).hexdigest()


def locked_versions() -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", LOCK.read_text(), flags=re.MULTILINE))


def build(folder: Path, say: Say = _say) -> None:
    """Makes the environment, unless it is there already. Running programs are not disturbed.

    Raises:
      SandboxError: it cannot be made, or something else is in its place.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _only_builder(folder, say):
            if (folder / _MARKER).is_file():
                return
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise SandboxError(
                    f"sandbox.runtime={str(folder)!r}: holds something else; must be empty, "
                    "missing, or made by `cir-jax build-runtime`"
                )
            _build_aside(folder, say)
    except OSError as error:
        raise SandboxError(f"sandbox.runtime={str(folder)!r}: {error}\n{_cure()}") from None


def _build_aside(folder: Path, say: Say) -> None:
    names = ", ".join(f"{name} {version}" for name, version in locked_versions().items())
    say(
        f"building the environment that programs run in, once: {names}, into {folder} "
        "(60 MB to fetch, 320 MB on disk, about a minute)"
    )
    started = time.monotonic()
    aside = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(aside, ignore_errors=True)  # of a build that was killed
    try:
        _fill(aside)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    say(f"built in {time.monotonic() - started:.0f} s")


def _fill(folder: Path) -> None:
    python = folder / "bin" / "python"
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    _run(
        [
            *(sys.executable, "-m", "pip", "--python", str(python), "install"),
            *("--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", str(LOCK)),
            *("--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"),
        ]
    )
    # What is here must load here.
    _run([str(python), "-I", "-c", "import " + ", ".join(locked_versions())])
    for path in (folder / "bin").iterdir():
        if not path.name.startswith("python"):
            path.unlink()  # scripts name the folder that they were installed to
    marker = {
        "lock": lock_hash(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": locked_versions(),
    }
    (folder / _MARKER).write_text(json.dumps(marker, indent=1) + "\n")


def _run(command: list[str]) -> None:
    env = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_PIP}
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-_SHOWN_LINES:]
        shown = "".join(f"\n  {line}" for line in said)
        name = "pip" if "pip" in command else " ".join(command[:4])
        raise SandboxError(f"no environment for programs: {name} failed:{shown}\n{_cure()}")


def _cure() -> str:
    return _CURE.format(lock=LOCK, trainers=TRAINERS)


@contextlib.contextmanager
def _only_builder(folder: Path, say: Say) -> Iterator[None]:
    """One process at a time; the kernel lets the next one in if this one is killed."""
    with open(folder.with_name(folder.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process builds {folder}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(folder: Path) -> Packages:
    where = f"sandbox.runtime={str(folder)!r}"
    interpreter = folder / "bin" / "python"
    try:
        marker = json.loads((folder / _MARKER).read_text())
        packages = Packages(
            str(folder),
            str(interpreter),
            marker["python"],
            marker["machine"],
            marker["lock"],
            dict(marker["versions"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SandboxError(f"{where}: {_MARKER} cannot be read ({error!r})") from None
    if packages.lock != lock_hash():
        raise SandboxError(
            f"{where}: built from the lock file {packages.lock[:12]}, must be from this version's, "
            f"{lock_hash()[:12]}: `cir-jax build-runtime` with another directory"
        )
    if not os.access(interpreter, os.X_OK):
        raise SandboxError(
            f"{where}: its python, {os.path.realpath(interpreter)}, is not there; remove the "
            "directory and it is built anew"
        )
    return packages


def _trainers() -> Packages:
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return Packages("", sys.executable, platform.python_version(), platform.machine(), "", versions)
