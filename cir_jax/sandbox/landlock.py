"""The rung without namespaces: Landlock, for machines whose containers forbid namespaces.

A program can read the interpreter's folders, /usr and nothing else, and connect nowhere. With the
filter of system calls it can write to no file, change no file's rights, owner, times or attributes,
and signal nobody. Not covered: it has the trainer's user (a dedicated one as root); the existence,
size and times of any path can be asked for; files that the trainer's user may read under /usr are
readable, and can be locked (flock) while the program runs; where root's interpreter or packages lie
behind a folder that is closed to others, everything that is root's in their folders and under /usr
is readable; it has no folder to write to; processes are not counted apart from the user's others,
so that memory alone limits threads.
"""

import os
import struct

from cir_jax.sandbox import linux
from cir_jax.sandbox.runtime import Runtime

_READ = 1 << 0 | 1 << 2 | 1 << 3  # EXECUTE, READ_FILE, READ_DIR
_READ_FILE, _WRITE_FILE, _READ_DIR = 1 << 2, 1 << 1, 1 << 3
# Number of kinds of access to files by version of the interface; later ones only add others.
_NUM_FILE_ACCESSES = {1: 13, 2: 14, 3: 15, 4: 15}
_NUM_FILE_ACCESSES_NEWEST = 16
_BOTH_TCP_ACCESSES = 3
_BOTH_SCOPES = 3  # abstract sockets, signals


def restrict(runtime: Runtime) -> None:
    """Restricts the calling process and all that it starts, for good.

    Raises:
      OSError: the kernel has no Landlock.
    """
    version = linux.landlock_version()
    if version < 1:
        raise OSError("this kernel has no Landlock")
    num_accesses = _NUM_FILE_ACCESSES.get(version, _NUM_FILE_ACCESSES_NEWEST)
    attributes = struct.pack("=Q", 2**num_accesses - 1)
    if version >= 4:
        attributes += struct.pack("=Q", _BOTH_TCP_ACCESSES)
    if version >= 6:
        attributes += struct.pack("=Q", _BOTH_SCOPES)
    whole, partial = runtime.parts("/usr", "/lib", "/lib64", "/bin")
    paths = dict.fromkeys(partial, _READ_DIR) | dict.fromkeys(whole, _READ)
    paths |= {"/dev/null": _READ_FILE | _WRITE_FILE, "/dev/zero": _READ_FILE}
    paths |= {"/dev/urandom": _READ_FILE, "/dev/random": _READ_FILE}
    rules = []
    for path, access in paths.items():
        if os.path.exists(path):
            # The kernel takes no right of a folder's for a file.
            access &= -1 if os.path.isdir(path) else ~_READ_DIR
            rules.append((access, os.open(path, os.O_PATH | os.O_CLOEXEC)))
    linux.set_no_new_privileges()
    linux.landlock_restrict(attributes, rules)
    for _, fd in rules:
        os.close(fd)
