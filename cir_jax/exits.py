"""How the program ends: its exit codes, and the errors that lead to them.

A wrapper that starts runs again can go by the code alone; the README's table says what each means.
"""

import errno
import signal

USER = 2
"""A config or an argument that cannot be used; argparse's own. The same command fails again."""
DATA = 65
"""No sound checkpoint: somebody has to look. BSD's EX_DATAERR."""
IO = 74
"""A disk or store that is full, read-only, failing or gone. BSD's EX_IOERR."""
AGAIN = 75
"""The machine's doing: the same command goes on. BSD's EX_TEMPFAIL."""
GATE = 76
"""A gate of the config has ended the run: its numbers are not what they should be."""
DIFFERENT = 78
"""The processes of a run differ in what has to be equal. BSD's EX_CONFIG."""
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
HUNG_UP = 128 + signal.SIGHUP


class RunError(Exception):
    """Ends a run for a reason that its user can do something about; the message is one line.

    Args:
      code: the program's exit code.
    """

    def __init__(self, message: str, code: int):
        super().__init__(" ".join(message.splitlines()))
        self.code = code


class Interrupted(Exception):
    """A signal asked for the end: what there was to save is saved, `resume=true` goes on."""

    def __init__(self, signum: int = signal.SIGINT):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


# What a disk or a store says, and no bug of ours does.
STORAGE_ERRORS = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EIO,
        errno.EACCES,
        errno.EPERM,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.EFBIG,
        errno.ENOENT,
        errno.ENOTDIR,
    )
)


def storage_error(error: OSError) -> RunError | None:
    """What to end with after an error of a disk or store; None if it is of another kind."""
    if error.errno not in STORAGE_ERRORS:
        return None
    return RunError(f"{error.filename or 'storage'}: {error.strerror}", IO)
