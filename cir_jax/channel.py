"""A worker process's end of its socket to the pool (see workers.py), and the messages' form.

From the pool: {"id", "job"}. From the worker: {"ready": info} once, then {"id", "reply"} for each
job, with "last": true if it wants to be replaced.
"""

import json
import os
import socket
import struct
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

MAX_MESSAGE_BYTES = 64 * 2**20
HEADER = struct.Struct(">I")
_MAX_FILES = 16
ORIGIN_READY = b"ready"


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


def serve_copies(fd: int, work: Callable[[int], NoReturn]) -> None:
    """Makes a worker, as a fork of this process, for each descriptor that the pool sends; until it
    goes away.

    Args:
      fd: of the socket to the pool (see starting.py).
      work: what a worker does, given its socket to the pool. It has to ask to be ended with this
        process.
    """
    with socket.socket(fileno=fd) as pool:
        pool.send(ORIGIN_READY)
        while files := socket.recv_fds(pool, 1, 1)[1]:
            _reap()
            try:
                pid = os.fork()
            except OSError as error:
                pool.send(f"no fork: {error}".encode())
            else:
                if pid == 0:
                    _work(work, pool, files[0])
                copy = os.pidfd_open(pid)
                socket.send_fds(pool, [str(pid).encode()], [copy])
                os.close(copy)
            os.close(files[0])


def _reap() -> None:
    """Lets go of the numbers of copies that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _work(work: Callable[[int], NoReturn], pool: socket.socket, fd: int) -> NoReturn:
    try:
        pool.close()
        os.setsid()  # Ctrl-C in the terminal is the trainer's to handle
        work(fd)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
