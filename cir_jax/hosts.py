"""The processes of a run, one per host: who this one is, and what they agree on.

How a process finds the others:

- On a slice of Cloud TPU VMs and on GKE's, through jax's own detection. JAX_PLATFORMS=cpu
  disables it.
- Elsewhere by three variables, which are all set or none:
    JAX_COORDINATOR_ADDRESS  HOST:PORT of process 0, the same for all; a free port there
    JAX_NUM_PROCESSES        how many there are
    JAX_PROCESS_ID           which one this is, from 0
  They count before the detection. With a loopback HOST, process 0 listens on loopback alone; else
  on all its addresses, or on that of JAX_COORDINATOR_BIND_ADDRESS (HOST:PORT or HOST). Ports of
  process 0: PORT, where the processes meet and watch each other (peers.py), and one that the system
  chooses, for JAX's service.
- Else, and with one process, there are no others: nothing here has any effect.

All processes get the same command, and a run directory that they share. Process 0 prints and writes
for all; of the others only what goes wrong is printed.

A process that ends because of another has the exit code 75: start all of them again. 78 says that
they differ in config, code, data or versions; 130 that any got Ctrl-C, 143 that any got SIGTERM.

What is asked of several processes has to be asked by all of them, in the same order: nothing here,
and no computation on the mesh, may stand under a condition that is not equal everywhere.

jax is imported when there are others: the command line knows of this module, too.
"""

import contextlib
import ctypes
import logging
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from cir_jax.config import ConfigError, HostsConfig
from cir_jax.peers import ADDRESS, BIND, COUNT, INDEX, VARIABLES, Limits, Peers, check_equal

_TPU_CLUSTERS = ("gcetpu", "gketpu")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# JAX's own service notices later than peers.py, which says more.
_LATER_S = 60
_JAX_JOIN_S, _JAX_SHUTDOWN_S = 300, 30
# A failed collective is mostly the doing of a process that has died: time to be told which.
_BLAME_S = 3.0
_SMALLEST_GATHER = 1024


class Place(NamedTuple):
    """address: of process 0, HOST:PORT."""

    address: str
    count: int
    index: int


class Stopped(Exception):
    """A process was asked to stop; all raise this at the same point."""


# Of a process there is one, as of what JAX knows of the others.
_peers: Peers | None = None
_code_of: Callable[[BaseException], int | None]
_is_agreed: Callable[[BaseException], bool]
_may_drop = _wants_to_drop = False
_seen_on_devices: set[str] = set()


def index() -> int:
    return _peers.index if _peers else 0


def count() -> int:
    return _peers.count if _peers else 1


def is_first() -> bool:
    """Whether this process writes and prints for all."""
    return index() == 0


def find() -> Place | None:
    """Where this process belongs; None if it is alone.

    Raises ConfigError naming the variable that is missing or wrong.
    """
    given = {name: os.environ.get(name, "") for name in VARIABLES}
    if not (given[COUNT] or given[INDEX]):
        place = _detect(given[ADDRESS])
        if place is None and given[ADDRESS]:
            raise ConfigError(f"{COUNT}, {INDEX}: are not set, but {ADDRESS} is")
        return place
    if missing := [name for name, value in given.items() if not value]:
        raise ConfigError(f"{', '.join(missing)}: not set; {', '.join(given)} are set together")
    place = Place(
        _address(given[ADDRESS]), _number(COUNT, given[COUNT]), _number(INDEX, given[INDEX])
    )
    if place.count < 1:
        raise ConfigError(f"{COUNT}={place.count}: must be above 0")
    if not 0 <= place.index < place.count:
        raise ConfigError(
            f"{INDEX}={place.index}: must be from 0 to {COUNT} - 1 = {place.count - 1}"
        )
    return place if place.count > 1 else None


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r}: must be a whole number") from None


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"{ADDRESS}={text!r}: must be HOST:PORT")
    return text


def _detect(address: str) -> Place | None:
    """On TPUs; address: instead of the detected one."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return None
    from jax._src import clusters

    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster.name in _TPU_CLUSTERS and cluster.is_env_present():
            if (num := cluster.get_process_count()) == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = address or cluster.get_coordinator_address(_JAX_JOIN_S, port)
            return Place(_address(address), num, cluster.get_process_id())
    return None


@contextlib.contextmanager
def joined(
    cfg: HostsConfig,
    facts: Callable[[], Mapping[str, str]],
    code_of: Callable[[BaseException], int | None],
    is_agreed: Callable[[BaseException], bool],
) -> Iterator[None]:
    """This process with the others, if there are any, from before JAX sees a device to the end.

    An exception ends this process, without more clean-up than the system does: that could wait for
    processes which wait for this one. They are told of it, and end, too.

    Args:
      facts: what has to be equal in all processes, by name.
      code_of: the exit code after an exception whose message says enough, else None.
      is_agreed: whether all processes raise an exception at the same point: then all end as one
        would alone.

    Raises:
      ConfigError: the environment names no place.
      RunError: processes are missing, or differ.
    """
    global _peers, _code_of, _is_agreed
    place = find()
    if place is None:
        yield
        return
    import jax

    logging.basicConfig(format=f"process {place.index}: %(levelname)s: %(message)s")
    host, port = place.address.rsplit(":", 1)
    host = host.strip("[]")
    bind = os.environ.get(BIND, "").rsplit(":", 1)[0].strip("[]")
    if host in _LOOPBACK and not bind:
        bind = "::1" if host == "::1" else "127.0.0.1"
    peers = Peers(
        place.index,
        place.count,
        host,
        int(port),
        bind=bind,
        limits=Limits(cfg.join_timeout_s, cfg.peer_timeout_s, cfg.stall_timeout_s),
        facts=facts(),
        offer={"port": _free_port(bind)} if place.index == 0 else {},
        say=lambda text: print(
            f"cir-jax: process {place.index} of {place.count}: {text}", file=sys.stderr, flush=True
        ),
    )
    service = peers.join()["port"]
    _peers, _code_of, _is_agreed = peers, code_of, is_agreed
    with guarded():
        peers.mark("starting JAX")
        # JAX would take SIGTERM for a notice that only orbax asks about; see train/stopping.py.
        jax.config.update("jax_enable_preemption_service", False)
        _delay_aborts()
        jax.distributed.initialize(
            f"{_bracketed(host)}:{service}",
            place.count,
            place.index,
            cluster_detection_method="deactivate",
            initialization_timeout=_JAX_JOIN_S,
            heartbeat_timeout_seconds=int(cfg.peer_timeout_s) + _LATER_S,
            shutdown_timeout_seconds=_JAX_SHUTDOWN_S,
            coordinator_bind_address=f"{_bracketed(bind or '::')}:{service}",
        )
        agreed = None
        try:
            yield
        except BaseException as error:
            if not is_agreed(error):
                raise
            agreed = error
        peers.mark("ending")
        peers.leave()
    _peers = None
    jax.distributed.shutdown()
    if agreed is not None:
        raise agreed


def _delay_aborts() -> None:
    """Lets a thread that aborts this process sleep first, by the signal's number of seconds.

    JAX's client aborts at once when process 0, which runs the service, has died. Other threads go
    on meanwhile: peers.py says who has died, and ends the process. No python could run in the
    handler: it is libc's own `sleep`, which is allowed there.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _free_port(bind: str) -> int:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.create_server((bind, 0), family=family) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Of several processes: an exception that is not agreed tells the others and ends this one."""
    try:
        yield
    except BaseException as error:
        if _peers is None or _is_agreed(error):
            raise
        if type(error).__name__ == "JaxRuntimeError":  # jax may not be imported yet
            time.sleep(_BLAME_S)
        code, text = _code_of(error), str(error)
        if code is None:
            traceback.print_exception(error)
            code, text = 1, traceback.format_exception_only(error)[-1].strip()
        else:
            print(f"cir-jax: {text}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        _peers.fail(text, code)
        os._exit(code)


# --- agreement


def exchange(name: str, value: Any) -> list[Any]:
    """Each process's value, a small one of JSON, in the order of the processes."""
    return _peers.exchange(name, value) if _peers else [value]


def of_first(name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns on process 0, a value of JSON; if it raises ConfigError there, all do."""
    made, error = None, ""
    if is_first():
        try:
            made = make()
        except ConfigError as raised:
            error = str(raised)
    made, error = exchange(name, [made, error])[0]
    if error:
        raise ConfigError(error)
    return made


def check_same(**facts: Any) -> None:
    """RunError, on all processes, if they differ in one of these."""
    named = {name.replace("_", " "): str(value) for name, value in facts.items()}
    check_equal(exchange(f"comparing {', '.join(named)}", named))


def gather(value: Any) -> list[Any]:
    """Each process's value, of any kind and size, in the order of jax.process_index().

    By the devices' network. Pickled: the other processes run the same program.
    """
    if _peers is None:
        return [value]
    import jax
    from jax.experimental import multihost_utils

    # A process's number among its devices' owners need not be that in the environment.
    data = pickle.dumps((jax.process_index(), value), protocol=5)
    longest = max(exchange("gathering", len(data)))
    # Few sizes: each is a program of its own. What comes after a pickle's end is not read.
    padded = np.zeros(max(_SMALLEST_GATHER, 1 << (longest - 1).bit_length()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    mark_devices(f"gathering {len(padded)} bytes")
    parts = [pickle.loads(part.data) for part in multihost_utils.process_allgather(padded)]
    mark("after gathering")
    return [value for _, value in sorted(parts, key=lambda part: part[0])]


# --- being asked to stop


@contextlib.contextmanager
def droppable() -> Iterator[None]:
    """Rollouts in here raise Stopped, all at the same segment, when any process wants to drop."""
    global _may_drop
    _may_drop = True
    try:
        yield
    finally:
        _may_drop = False


def want_to_drop(wants: bool) -> None:
    """Of this process: whether a signal asks for it."""
    global _wants_to_drop
    _wants_to_drop = wants


def asked_to_drop() -> bool:
    """Whether this process has to tell the others of it."""
    return _may_drop and _wants_to_drop


# --- where this process is


def mark(phase: str) -> None:
    """Work of this process's own begins."""
    if _peers:
        _peers.mark(phase)


def mark_devices(phase: str, program: str = "") -> None:
    """From here on this process waits for devices, but for a program's first time: that compiles.

    program: that `phase` is a run of; by default the phase is its name.
    """
    if _peers:
        _peers.mark(phase, waits=(program or phase) in _seen_on_devices)
        _seen_on_devices.add(program or phase)
