"""Output of a job that outlasts whoever reads it: a terminal that is closed, a pipe's other end."""

import io
import os
import sys


def outlast_readers() -> None:
    """From here on, what cannot be written to stdout or stderr is lost, and raises nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue  # closed from the start, or somebody else's already
        stream.flush()
        raw = _Outlasting(stream.fileno(), "wb", closefd=False)
        lasting = io.TextIOWrapper(
            io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=True
        )
        setattr(sys, name, lasting)


class _Outlasting(io.FileIO):
    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes
