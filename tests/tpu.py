"""Compiles programs for TPU slices that are not here. Needs libtpu."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # The tests' flags for CPUs are unknown to libtpu, which then ends the process.
    "XLA_FLAGS": "",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Another process may have libtpu loaded as well.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def run(program, *arguments):
    """What a program prints last, as JSON; its one argument is the list, as JSON too.

    It gets a process of its own, for which the topology's devices are the only ones.
    """
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -e '.[tpu]'")
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])
