"""A worker process's end of its socket to the pool (see workers.py), and the messages' form.

From the pool: {"id", "job"}. From the worker: {"ready": info} once, then {"id", "reply"} for each
job, with "last": true if it wants to be replaced.
"""

import json
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any

MAX_MESSAGE_BYTES = 64 * 2**20
HEADER = struct.Struct(">I")
_MAX_FILES = 16


def encode(message: Mapping[str, Any]) -> bytes:
    """Length-prefixed JSON.

    Raises:
      ValueError: it is over MAX_MESSAGE_BYTES.
    """
    body = json.dumps(message).encode()
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    return HEADER.pack(len(body)) + body


class Channel:
    """A worker's end of its socket: blocking, whole messages."""

    def __init__(self, fd: int):
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._files: list[int] = []

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, message: Mapping[str, Any]) -> None:
        self._socket.sendall(encode(message))

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None once the pool has gone."""
        header = self._read(HEADER.size)
        body = self._read(HEADER.unpack(header)[0]) if header else None
        return json.loads(body) if body else None

    def take_files(self) -> list[int]:
        """Descriptors that came with the last message; they are the caller's to close."""
        files = self._files.copy()
        self._files.clear()
        return files

    def _read(self, num_bytes: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < num_bytes:
            size = min(num_bytes - len(parts), 2**20)
            part, files, _, _ = socket.recv_fds(self._socket, size, _MAX_FILES)
            self._files += files
            if not part:
                return None
            parts += part
        return bytes(parts)


def serve(channel: Channel, handle: Callable[[dict], dict], info: Mapping[str, Any]) -> None:
    """Says that the worker is ready, then answers jobs until the pool goes away.

    Args:
      handle: maps a job to its reply; what it raises ends the worker.
      info: what the pool shows about its workers, for example a start-up time.
    """
    channel.send({"ready": dict(info)})
    while (message := channel.receive()) is not None:
        channel.send({"id": message["id"], "reply": handle(message["job"])})
