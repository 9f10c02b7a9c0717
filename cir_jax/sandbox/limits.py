"""What one program may use."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one program; each program starts with all of them unused."""

    timeout_s: float = 5.0
    """Wall-clock seconds from the program's start; time in the queue does not count."""
    memory_bytes: int = 2 * 2**30
    """Address space of each process, numpy and sympy included; over it: MemoryError. On top of it
    come the memory that files in /tmp and output take (`scratch_bytes`, twice `file_bytes`) and
    what the kernel keeps for the process."""
    output_bytes: int = 2**20
    """Kept of each of stdout and stderr; of a longer one the beginning and the end are kept."""
    file_bytes: int = 16 * 2**20
    """Largest file, and the most that stdout or stderr may take; over it: OSError."""
    scratch_bytes: int = 64 * 2**20
    """All files of a program together, in /tmp and /dev/shm."""
    num_scratch_files: int = 8192
    """Number of files and folders."""
    allow_processes: bool = False
    """Whether programs may start processes. Without, a program has one address space, so that
    `memory_bytes` limits all of its own memory."""
    num_tasks: int = 64
    """Threads, and processes if allowed, of a program together. Where the kernel counts them by
    user for the whole machine (before Linux 5.14, on rung landlock, and for root without user
    namespaces) a program may have a thousand more."""
    num_open_files: int = 256
    """Open descriptors of each process."""
    grace_s: float = 5.0
    """How long after `timeout_s` the worker itself is given up, clearing up included."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is not bool and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field.name} must be positive and finite, got {value}")
