"""The environment of workers and programs."""

# All of it. A fixed hash seed makes the order of sets the same in all workers; threads of the
# linear algebra would break the limits.
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "USER": "user",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    # An interpreter starts before it is isolated, when /tmp is still the host's, where any user may
    # put a folder of modules: it must not look for one in HOME.
    "PYTHONNOUSERSITE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Else each thread reserves 64 MiB of the address space that the limit is on.
    "MALLOC_ARENA_MAX": "2",
}
