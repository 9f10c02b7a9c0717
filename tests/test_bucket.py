"""Checkpoints in a bucket, against an emulator of Google Cloud Storage on this machine."""

import pytest
from test_checkpoint import assert_same, state_of, target

from cir_jax.config import CheckpointConfig
from cir_jax.train.checkpoint import Checkpoints, Place

emulator = pytest.importorskip("gcp_storage_emulator.server")
pytest.importorskip("gcsfs")


@pytest.fixture(scope="module")
def bucket():
    """Of both clients: gcsfs, which etils lists and renames by, and tensorstore's for arrays."""
    server = emulator.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    server.start()
    url = f"http://localhost:{server._api._httpd.server_address[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setenv("NO_GCE_CHECK", "true")
        yield "gs://bucket"
    server.stop()


def test_saved_damaged_and_restored(bucket, tmp_path):
    cfg = CheckpointConfig(dir=f"{bucket}/run", keep=2, keep_best=0)
    notes = []
    checkpoints = Checkpoints(tmp_path, cfg, notes.append, writes=True)
    for step in (1, 2, 3):
        checkpoints.save(state_of(step), Place("rl", step), wait=True)
    checkpoints.close()
    assert not notes and not list(tmp_path.iterdir())
    checkpoints = Checkpoints(tmp_path, cfg, notes.append, writes=True)
    assert checkpoints._numbers() == [2, 3]
    assert_same(checkpoints.restore(target(state_of(0))).state, state_of(3))
    record = checkpoints.folder / "3/record/metadata"
    record.write_text(record.read_text().replace('"step": 3', '"step": 4'))
    assert checkpoints.restore(target(state_of(0))).record.place.step == 2
    assert "gs://bucket/run/3" in notes[0] and "damaged" in notes[0]
    checkpoints.close()
