"""Which files of the host programs need: the interpreter, its standard library, numpy and sympy."""

import dataclasses
import glob
import importlib.machinery
import os
import sys
import sysconfig

LIBRARIES = ("numpy", "sympy", "mpmath", "scipy", "networkx")
_REQUIRED = ("numpy", "sympy")


@dataclasses.dataclass(frozen=True)
class Runtime:
    folders: tuple[str, ...]
    """Real paths on the host, none inside another."""
    hidden: tuple[str, ...] = ()
    """Folders inside of these, or of /usr, that are not for programs: others' packages."""

    def parts(self, *others: str) -> tuple[set[str], set[str]]:
        """These folders and others, without what is hidden in them.

        Returns: paths to be seen with all that is in them, and folders of which only the names in
          them are to be seen.
        """
        whole: set[str] = set()
        partial: set[str] = set()
        left = {os.path.realpath(path) for path in (*self.folders, *others)}
        while left:
            path = left.pop()
            if any(_holds(hidden, path) for hidden in self.hidden):
                continue
            if any(_holds(path, hidden) for hidden in self.hidden):
                partial.add(path)
                inner = {os.path.realpath(os.path.join(path, name)) for name in os.listdir(path)}
                left |= inner - partial
            else:
                whole.add(path)
        return whole, partial

    def inside(self, folder: str) -> str:
        """Where a namespace shows a folder: programs have a /tmp of their own."""
        if folder.startswith("/tmp/"):
            return f"/run/python{folder}"
        return folder

    def use(self, *, moved: bool) -> None:
        """Makes imports of this process go to these folders alone.

        Args:
          moved: whether to where `inside` says, for when that is where they are.
        """
        sys.path[:] = self._visible(sys.path, moved)
        # Of packages installed in editable form, which are elsewhere.
        sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in _module_of(f)]
        for module in list(sys.modules.values()):
            if isinstance(path := getattr(module, "__path__", None), list):
                path[:] = self._visible(path, moved)
        sys.path_importer_cache.clear()

    def _visible(self, paths: list[str], moved: bool) -> list[str]:
        found = []
        for path in paths:
            real = os.path.realpath(path)
            if any(_holds(hidden, real) for hidden in self.hidden):
                continue
            for folder in self.folders:
                if _holds(folder, real):
                    found.append((self.inside(folder) if moved else folder) + real[len(folder) :])
        return found


def find() -> Runtime:
    """That of the running interpreter, which has been given this package's folder first.

    Of a virtual environment's base, only the interpreter and its standard library.

    Raises:
      ModuleNotFoundError: it lacks numpy or sympy.
    """
    bases = {sys.base_prefix, sys.base_exec_prefix}
    paths = {sys.prefix, sys.exec_prefix} - bases
    paths |= {os.path.join(base, name) for base in bases for name in ("bin", "lib", "lib64")}
    paths = {path for path in paths if os.path.isdir(path)}
    paths |= {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    libraries = set()
    for name in LIBRARIES:
        # The first folder may be the trainer's, with its packages.
        spec = importlib.machinery.PathFinder.find_spec(name, sys.path[1:])
        if spec is None or spec.origin is None:
            if name in _REQUIRED:
                raise ModuleNotFoundError(f"{sys.executable} has no {name}, which programs need")
            continue
        libraries.add(os.path.realpath(os.path.dirname(os.path.dirname(spec.origin))))
    hidden = set() if sys.prefix in bases else _others_packages(bases, libraries)
    return Runtime(
        _outermost({os.path.realpath(path) for path in paths} | libraries), _outermost(hidden)
    )


def _others_packages(bases: set[str], libraries: set[str]) -> set[str]:
    """Where packages of other interpreters lie, in what programs can otherwise read."""
    found = set()
    for base in {"/usr", "/usr/local", *bases}:
        for kind in ("site-packages", "dist-packages"):
            found |= set(glob.glob(f"{glob.escape(base)}/lib*/python3*/{kind}"))
    real = {os.path.realpath(path) for path in found}
    return {path for path in real if not any(_holds(path, library) for library in libraries)}


def _module_of(finder: object) -> str:
    return getattr(finder, "__module__", "") or ""


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _outermost(paths: set[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for path in sorted(paths):
        if path != "/" and not any(path.startswith(other + "/") for other in kept):
            kept.append(path)
    return tuple(kept)


def is_closed(path: str) -> bool:
    """Whether other users may not enter `path`, or a folder on the way to it."""
    parts = path.split(os.sep)
    folders = (os.sep.join(parts[:i]) for i in range(2, len(parts) + 1))
    return any(not os.stat(folder).st_mode & 0o001 for folder in folders)
