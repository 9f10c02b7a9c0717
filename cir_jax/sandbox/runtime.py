"""Which files of the host programs need: the interpreter, its standard library, numpy and sympy."""

import dataclasses
import importlib.util
import os
import sys
import sysconfig

LIBRARIES = ("numpy", "sympy", "mpmath", "scipy", "networkx")
_REQUIRED = ("numpy", "sympy")


@dataclasses.dataclass(frozen=True)
class Runtime:
    folders: tuple[str, ...]
    """Real paths on the host, none inside another."""

    def inside(self, folder: str) -> str:
        """Where a namespace shows a folder: programs have a /tmp of their own."""
        if folder.startswith("/tmp/"):
            return f"/run/python{folder}"
        return folder

    def use(self, *, moved: bool) -> None:
        """Makes imports of this process go to these folders alone.

        Args:
          moved: whether to where `inside` says.
        """
        sys.path[:] = self._visible(sys.path, moved)
        for module in list(sys.modules.values()):
            if isinstance(path := getattr(module, "__path__", None), list):
                path[:] = self._visible(path, moved)
        sys.path_importer_cache.clear()

    def _visible(self, paths: list[str], moved: bool) -> list[str]:
        found = []
        for path in paths:
            real = os.path.realpath(path)
            for folder in self.folders:
                if real == folder or real.startswith(folder + "/"):
                    found.append((self.inside(folder) if moved else folder) + real[len(folder) :])
        return found


def find() -> Runtime:
    """That of the running interpreter.

    Raises:
      ModuleNotFoundError: it lacks numpy or sympy.
    """
    paths = {sys.prefix, sys.base_prefix, sys.exec_prefix, sysconfig.get_path("stdlib")}
    paths.add(sysconfig.get_path("platstdlib"))
    for name in LIBRARIES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            if name in _REQUIRED:
                raise ModuleNotFoundError(f"{sys.executable} has no {name}, which programs need")
            continue
        paths.add(os.path.dirname(os.path.dirname(spec.origin)))
    return Runtime(_outermost({os.path.realpath(path) for path in paths}))


def _outermost(paths: set[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for path in sorted(paths):
        if path != "/" and not any(path.startswith(other + "/") for other in kept):
            kept.append(path)
    return tuple(kept)


def blocking_folder(path: str) -> str | None:
    """The outermost folder on the way to `path` that other users may not enter."""
    parts = path.split(os.sep)
    for i in range(2, len(parts) + 1):
        folder = os.sep.join(parts[:i])
        if not os.stat(folder).st_mode & 0o001:
            return folder
    return None
