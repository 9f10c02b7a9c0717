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

A process that ends because of another, or of what all share, has the exit code 75 (start all of them
again), or 78: they differ in config, code, data or versions; 130 after Ctrl-C on any, 143 after
SIGTERM on any.

What is asked of several processes has to be asked by all of them, in the same order: nothing here,
and no computation on the mesh, may stand under a condition that is not equal everywhere.
"""

import contextlib
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from cir_jax import exits
from cir_jax.config import ConfigError, HostsConfig
from cir_jax.exits import RunError
from cir_jax.peers import Limits, Peers, check_equal

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BIND = "JAX_COORDINATOR_BIND_ADDRESS"
_TPU_CLUSTERS = ("gcetpu", "gketpu")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
