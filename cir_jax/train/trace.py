"""What each RL step was made of, for the hash chain of the metrics and for `cir-jax diff-runs`.

`rollouts/NNNNNN.npz` has, of one step, the tokens of all rows one after the other (`ids`, `author`,
`logp`), of each row `length`, `problem`, `sample`, `reward` and `stop`, and of each parameter after
the step `leaf` and `digest`.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cir_jax.records import Trajectory

ROLLOUTS = "rollouts"
_FILE = re.compile(r"(\d{6,})(?:\.(\d+))?\.npz")


def batch_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """One digest of arrays: 16 hex digits."""
    own = hashlib.blake2b(digest_size=8)
    for name, array in sorted(arrays.items()):
        own.update(f"{name} {array.dtype} {array.shape}\n".encode())
        own.update(np.ascontiguousarray(array))
    return own.hexdigest()


def step_arrays(
    trajectories: Sequence[Trajectory], rewards: Sequence[float]
) -> dict[str, np.ndarray]:
    """Of all rows of a step, as above."""
    return {
        "ids": np.concatenate([t.ids for t in trajectories]).astype(np.int32),
        "author": np.concatenate([t.author for t in trajectories]).astype(np.int8),
        "logp": np.concatenate([t.logp for t in trajectories]).astype(np.float32),
        "length": np.array([len(t.ids) for t in trajectories], np.int32),
        "problem": np.array([t.problem.problem_id.encode() for t in trajectories]),
        "sample": np.array([t.sample for t in trajectories], np.int32),
        "stop": np.array([t.stop_reason.encode() for t in trajectories]),
        "reward": np.array(rewards, np.float32),
    }


def write(
    run_dir: Path, step: int, arrays: Mapping[str, np.ndarray], leaves: Mapping[str, str]
) -> None:
    """leaves: digests of the parameters after the step."""
    folder = run_dir / ROLLOUTS
    folder.mkdir(exist_ok=True)
    of_leaves = {
        "leaf": np.array([x.encode() for x in leaves]),
        "digest": np.array([x.encode() for x in leaves.values()]),
    }
    with open(folder / f"{step:06d}.npz", "wb") as file:
        np.savez_compressed(file, **arrays, **of_leaves)


def files_of(run_dir: Path, step: int) -> list[Path]:
    """Of a step, in the processes' order."""
    return [path for number, path in _files(run_dir) if number == step]


def drop_after(run_dir: Path, step: int) -> None:
    """Removes the files of later steps, which are going to be taken again."""
    for number, path in _files(run_dir):
        if number > step:
            path.unlink()


def _files(run_dir: Path) -> list[tuple[int, Path]]:
    found = [(_FILE.fullmatch(path.name), path) for path in (run_dir / ROLLOUTS).glob("*.npz")]
    keyed = [((int(m[1]), int(m[2] or 0)), path) for m, path in found if m]
    return [(step, path) for (step, _), path in sorted(keyed)]
