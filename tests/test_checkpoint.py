"""Checkpoints: sound ones come back to the bit on any mesh, damaged ones are named and left out."""

import dataclasses
import json
import os
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax import exits
from cir_jax.config import CheckpointConfig, ConfigError
from cir_jax.exits import RunError
from cir_jax.train import digest
from cir_jax.train.checkpoint import Checkpoints, Damaged, Place, Record
from cir_jax.train.state import TrainState

AXES = ("data", "fsdp", "tensor")


def mesh_of(*shape):
    return jax.sharding.Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), AXES)


def state_of(seed, mesh=None):
    """With leaves of each type that states have, laid out over all axes that they can be."""
    mesh = mesh or mesh_of(1, 1, 1)
    rng = np.random.default_rng(seed)
    layout = {
        "w": jax.sharding.PartitionSpec("fsdp", "tensor"),
        "v": jax.sharding.PartitionSpec(None, ("fsdp", "tensor")),
        "b": jax.sharding.PartitionSpec(),
    }
    arrays = {
        "w": rng.normal(size=(64, 16)).astype(np.float32),
        "v": rng.normal(size=(3, 32)).astype(jnp.bfloat16),
        "b": rng.normal(size=5).astype(np.float32),
    }
    put = {k: jax.device_put(x, jax.NamedSharding(mesh, layout[k])) for k, x in arrays.items()}
    everywhere = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
    number = jax.device_put(np.int32(seed), everywhere)
    return TrainState(put, {"count": number, "mu": put["w"] * 2}, number)


def target(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def opened(folder, notes=None, **keys):
    return Checkpoints(
        folder,
        CheckpointConfig(**{"keep": 3, "keep_best": 0} | keys),
        (notes if notes is not None else []).append,
        writes=True,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with the checkpoints of RL steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = opened(folder)
    for step in (1, 2, 3):
        checkpoints.save(state_of(step), Place("rl", step), config={"a": {"b": step}}, score=-step)
    checkpoints.close()
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def test_the_next_update_has_a_saved_states_memory(tmp_path):
    """And what is saved is the state as it was."""
    checkpoints = opened(tmp_path)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state, saved_states = jax.tree.map(jnp.copy, state_of(1)), {}
    for step in range(3):
        saved_states[step] = jax.tree.map(lambda x: np.array(x), state)
        places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
        checkpoints.save(state, Place("rl", step))
        state = update(state)
        assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)] == places
    checkpoints.close()
    for step, expected in saved_states.items():
        reader = Checkpoints(tmp_path, CheckpointConfig())  # drops nothing
        assert_same(reader.restore(target(state), step=step).state, expected)


def step_dir(folder, step):
    return folder / "checkpoints" / str(step)


def payload(folder):
    """The file of a checkpoint with most of its arrays' bytes."""
    files = [p for p in (folder / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def is_in_memory(path):
    """Whether the system can give a file's first bytes without its disk."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except (AttributeError, OSError) as error:
            pytest.skip(f"this system does not say what is in memory: {error}")


def test_the_next_checkpoint_has_the_memory_of_the_files_before(tmp_path):
    checkpoints = opened(tmp_path)
    checkpoints.save(state_of(1), Place("rl", 1), wait=True)
    first = payload(step_dir(tmp_path, 1))
    before = is_in_memory(first)
    checkpoints.save(state_of(2), Place("rl", 2), wait=True)
    after = is_in_memory(first), is_in_memory(payload(step_dir(tmp_path, 2)))
    checkpoints.close()
    assert (before, after) == (True, (False, True))


def flip_bits(path, at, bit):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_digest_sees_any_bit_and_no_mesh():
    shapes = ((1, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2))
    by_mesh = [digest.leaf_digests(state_of(0, mesh_of(*s)).params) for s in shapes]
    assert by_mesh[0] == by_mesh[1] == by_mesh[2] == by_mesh[3]
    # By hand: the sums of the bit patterns, and of these times 1, 2, ..., modulo 2^32.
    bits = np.asarray(state_of(0).params["b"]).view(np.uint32).astype(object)
    sums = (int(sum(x)) % 2**32 for x in (bits, bits * np.arange(1, 6)))
    assert by_mesh[0]["b"] == "".join(f"{x:08x}" for x in sums)
    rng = random.Random(0)
    for dtype in (np.uint32, np.uint16):
        x = np.array(rng.choices(range(2**16), k=50), dtype)
        floats = x.view(np.float32 if dtype == np.uint32 else jnp.bfloat16)
        before = digest.leaf_digests({"x": floats})
        for _ in range(10):
            changed = x.copy()
            changed[rng.randrange(50)] ^= dtype(1 << rng.randrange(x.itemsize * 8))
            assert digest.leaf_digests({"x": changed.view(floats.dtype)}) != before
        swapped = x.copy()
        swapped[[3, 7]] = swapped[[7, 3]]
        assert digest.leaf_digests({"x": swapped.view(floats.dtype)}) != before


def test_digest_gathers_no_leaf():
    """Each device sums what it has: of a leaf only sums travel."""
    state = state_of(0, mesh_of(2, 2, 2))
    text = digest._sums.lower(jax.tree.leaves(state.params)).compile().as_text()
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* all-gather", text)
    assert all(np.prod([int(n) for n in shape.split(",") if n]) <= 8 for shape in gathered)


def test_params_digest_names_a_leaf_that_is_not_finite():
    params = {"a": jnp.zeros(3), "b": {"c": jnp.array([1.0, np.nan])}}
    whole, leaves, unsound = digest.params_digest(params)
    assert unsound == "b/c" and list(leaves) == ["a", "b/c"]
    assert digest.params_digest({"a": jnp.zeros(3), "b": {"c": jnp.zeros(2)}})[2] == ""
    assert whole == digest.combined(dict(reversed(leaves.items())))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_restored_on_any_mesh(saved, shape):
    mesh = mesh_of(*shape)
    checkpoints = Checkpoints(saved, CheckpointConfig())
    state, critic, record = checkpoints.restore(target(state_of(0, mesh)))
    checkpoints.close()
    assert_same(state, state_of(3))
    assert state.params["w"].sharding.mesh == mesh and critic is None
    assert (record.place, record.config, record.score) == (Place("rl", 3), {"a": {"b": 3}}, -3)


def damage_truncated(folder):
    os.truncate(payload(folder), payload(folder).stat().st_size // 2)


def damage_flipped(folder):
    """Of the arrays' bytes, which are most of the file."""
    flip_bits(payload(folder), payload(folder).stat().st_size // 2, 3)


def damage_record(folder):
    path = folder / "record/metadata"
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))


def damage_no_record(folder):
    shutil.rmtree(folder / "record")


def damage_no_state(folder):
    shutil.rmtree(folder / "state")


def damage_empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = (
    damage_truncated,
    damage_flipped,
    damage_record,
    damage_no_record,
    damage_no_state,
    damage_empty,
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_one_before_is_taken(copy, damage):
    damage(step_dir(copy, 3))
    notes = []
    checkpoints = opened(copy, notes)
    state, _, record = checkpoints.restore(target(state_of(0)))
    assert record.place.step == 2
    assert_same(state, state_of(2))
    (note,) = notes
    assert str(step_dir(copy, 3)) in note and "damaged" in note and "\n" not in note
    if damage is damage_flipped:
        assert "state/" in note and "digest" in note
    with pytest.raises(RunError, match="resume_step=3: .*damaged") as error:
        checkpoints.restore(target(state_of(0)), step=3)
    assert error.value.code == exits.DATA
    # The next save takes the damaged one away, and numbers go on.
    checkpoints.save(state, Place("rl", 3), wait=True)
    checkpoints.close()
    assert sorted(os.listdir(copy / "checkpoints")) == ["1", "2", "4"]


def test_each_of_many_flipped_bits_is_seen(saved, tmp_path):
    """In any byte of the payload: an error of orbax's or another digest, never other numbers."""
    rng = random.Random(0)
    size = payload(step_dir(saved, 3)).stat().st_size
    for i in range(8):
        run = tmp_path / str(i)
        shutil.copytree(step_dir(saved, 3), step_dir(run, 3))
        flip_bits(payload(step_dir(run, 3)), rng.randrange(size), rng.randrange(8))
        checkpoints = Checkpoints(run, CheckpointConfig())
        try:
            assert_same(checkpoints.restore(target(state_of(0))).state, state_of(3))
        except RunError as error:
            assert error.code == exits.DATA and "none of its 1" in str(error)
        checkpoints.close()


def test_none_sound_is_an_error_and_none_at_all_is_not(copy, tmp_path):
    for step in (1, 2, 3):
        damage_empty(step_dir(copy, step))
    with pytest.raises(RunError, match="none of its 3 checkpoints is sound"):
        opened(copy).restore(target(state_of(0)))
    assert opened(tmp_path / "new").restore(target(state_of(0))) is None


def test_what_is_refused_is_not_damage(saved):
    def refuse(record: Record):
        raise ConfigError("another config")

    def too_short(record: Record):
        if record.place.step == 3:
            raise Damaged("metrics.jsonl has 1 bytes")

    checkpoints = Checkpoints(saved, CheckpointConfig())
    with pytest.raises(ConfigError, match="another"):
        checkpoints.restore(target(state_of(0)), accept=refuse)
    assert checkpoints.restore(target(state_of(0)), accept=too_short).record.place.step == 2


def test_a_step_that_is_asked_for(copy):
    reader = Checkpoints(copy, CheckpointConfig())
    assert reader.restore(target(state_of(0)), step=2).record.place.step == 2
    # The scores are -1, -2, -3.
    assert reader.restore(target(state_of(0)), step="best").record.place.step == 1
    with pytest.raises(ConfigError, match=r"resume_step=7: .* there are \[1, 2, 3\]"):
        reader.restore(target(state_of(0)), step=7)
    assert len(os.listdir(copy / "checkpoints")) == 3
    writer = opened(copy)
    writer.restore(target(state_of(0)), step=2)
    writer.close()
    assert sorted(os.listdir(copy / "checkpoints")) == ["1", "2"]


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = opened(tmp_path, keep=1, keep_best=2)
    for step, score in enumerate((None, 0.5, 0.9, 0.1, 0.7, 0.2)):
        checkpoints.save(state_of(0), Place("rl", step), score=score)
    checkpoints.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "5", "6"]
    # Known again after a restart.
    checkpoints = opened(tmp_path, keep=1, keep_best=2)
    checkpoints.save(state_of(0), Place("rl", 9), score=0.8)
    checkpoints.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "7"]


def test_unfinished_saves_are_removed_by_who_saves(copy):
    unfinished = copy / "checkpoints/4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "file").touch()
    Checkpoints(copy, CheckpointConfig()).close()
    assert unfinished.exists()
    opened(copy).close()
    assert not unfinished.exists()


def fail(monkeypatch, times, where="save"):
    """The next saves, at once or in the background, are as on a full disk."""
    import orbax.checkpoint as ocp

    original, count = getattr(ocp.CheckpointManager, where), [0]

    def failing(self, *args, **options):
        count[0] += 1
        if count[0] <= times:
            raise OSError(28, "No space left on device", str(self.directory))
        return original(self, *args, **options)

    monkeypatch.setattr(ocp.CheckpointManager, where, failing)


@pytest.mark.parametrize("where", ["save", "wait_until_finished"])
def test_failing_saves_are_noted_then_end_the_run(tmp_path, monkeypatch, where):
    notes = []
    checkpoints = opened(tmp_path, notes, max_failures=2)
    checkpoints.save(state_of(0), Place("rl", 0), wait=True)
    with monkeypatch.context() as patch:
        fail(patch, 1, where)
        checkpoints.save(state_of(1), Place("rl", 1))
        checkpoints.check()
        checkpoints.save(state_of(2), Place("rl", 2), wait=True)
    (note,) = notes
    assert "No space left" in note and "tries again" in note
    with monkeypatch.context() as patch:
        fail(patch, 9, where)
        with pytest.raises(RunError, match="No space left.*2 times in a row") as error:
            checkpoints.save(state_of(3), Place("rl", 3), wait=True)
    assert error.value.code == exits.IO
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))
    assert_same(opened(tmp_path).restore(target(state_of(0))).state, state_of(2))


def test_record_is_checked_as_a_whole():
    record = Record(Place("rl", 3, {"a": 1}), {"x": [1, None]}, {"state": {"w": "00"}}, 0.25)
    tree = json.loads(json.dumps(record.to_json()))
    assert Record.from_json(tree) == record
    for field in dataclasses.fields(Record):
        with pytest.raises(ValueError, match="changed"):
            Record.from_json(tree | {field.name: None})
