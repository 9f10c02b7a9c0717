"""`cir-jax sft` on files, with a tiny model: lower losses, whatever the packing, and resumed."""

import contextlib
import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from cir_jax import cli, metrics
from cir_jax import config as configs
from cir_jax.config import ConfigError
from cir_jax.tokenizer import Tokenizer
from cir_jax.train import loop, rollouts
from cir_jax.train.display import Display
from cir_jax.train.sft import FromFiles, Generated, SFTData

ROOT = Path(__file__).parent.parent
TINY = (
    "model.num_layers=2",
    "model.width=32",
    "model.head_dim=8",
    "model.mlp_width=32",
    "rollout.slots=8",
    "rollout.max_response_tokens=80",
    "sft.weights=''",
    "sft.epochs=4",
    "sft.batch_size=6",
    "sft.micro_rows=2",
    "sft.held_out=4",
    "sft.held_out_every=5",
    "sft.optim.learning_rate=0.01",
    "sft.optim.schedule=cosine",
    "sft.optim.warmup_share=0.1",
    "eval.num_problems=0",
    "checkpoint.every=4",
    "sandbox.num_workers=1",
)
# Two trajectories of each of 12 questions, by text and by code, and one that is too long.
ROWS = [
    row
    for n in range(10, 22)
    for row in (
        {"question": f"What is {n} + 1?", "response": f"The answer is \\boxed{{{n + 1}}}."},
        {
            "messages": [
                {"role": "user", "content": f"What is {n} + 1?"},
                {"role": "assistant", "content": f"```python\nprint({n} + 1)\n```"},
                {"role": "tool", "content": f"{n + 1}\n"},
                {"role": "assistant", "content": f"The answer is \\boxed{{{n + 1}}}."},
            ]
        },
    )
] + [{"question": "How long?", "response": "0" * 81}]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.meshes, "make_mesh", lambda cfg: mesh)
        # Nothing is run, and a sandbox's start takes longer than a run.
        patch.setattr(rollouts, "open_store", lambda cfg, record_dir, process: NoSandbox())
        yield


class NoSandbox(contextlib.nullcontext):
    description = {}

    def __enter__(self):
        return self

    def figures(self):
        return {}

    def size(self):
        return 0

    def truncate(self, size):
        pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def overrides(data, run_dir, *more):
    return (*TINY, f"sft.data={data}", f"run_dir={str(run_dir)!r}", *more)


def load(data, *more):
    return configs.load(ROOT / "configs/quickstart.toml", overrides(data, "unused", *more))


def sft(data, run_dir, *more):
    config = str(ROOT / "configs/quickstart.toml")
    assert cli.main(["sft", config, *overrides(data, run_dir, *more)]) == 0
    return run_dir


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    return sft(data, tmp_path_factory.mktemp("run") / "first")


def losses(run_dir, kind):
    return {r["step"]: r["loss"] for r in metrics.read(run_dir) if r["kind"] == kind}


def test_losses_fall(first):
    """24 whole rows, 4 of them held out: 3 updates of 6 in each of 4 epochs."""
    trained, held_out = losses(first, "sft"), losses(first, "held_out")
    assert list(trained) == list(range(1, 13)) and list(held_out) == [0, 5, 10, 12]
    # At first each of 640 tokens is about as likely as any: ln 640 = 6.5.
    assert trained[1] == pytest.approx(6.5, abs=0.5) and trained[12] < trained[1] - 2
    assert held_out[0] == pytest.approx(6.5, abs=0.5) and held_out[12] < held_out[0] - 2
    counts = json.loads((first / loop.SFT_FILE).read_text())
    assert {name: n for name, n in counts.items() if n} == {"kept": 24, "too_long": 1}


def test_packing_changes_no_loss(first, data, tmp_path):
    """Longer rows, and more of them in a micro-batch: the same losses, but that Adam makes more of
    the last bits from update to update."""
    other = sft(data, tmp_path / "run", "sft.micro_rows=6", "data.max_prompt_tokens=140")
    for kind in ("sft", "held_out"):
        a, b = losses(first, kind), losses(other, kind)
        assert list(a) == list(b)
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-3)
    np.testing.assert_allclose(losses(first, "sft")[1], losses(other, "sft")[1], rtol=1e-5)


def test_interrupted_and_resumed_equals_uninterrupted(first, data, tmp_path, monkeypatch):
    save_if_due = loop.Run.save_if_due

    def signalled(self, state, phase, step, critic=None):
        if step == 5:
            self.stopper.signum = signal.SIGINT
        save_if_due(self, state, phase, step, critic)

    run_dir = tmp_path / "run"
    monkeypatch.setattr(loop.Run, "save_if_due", signalled)
    config = str(ROOT / "configs/quickstart.toml")
    assert cli.main(["sft", config, *overrides(data, run_dir)]) == cli.EXIT_INTERRUPTED
    monkeypatch.setattr(loop.Run, "save_if_due", save_if_due)
    sft(data, run_dir, "resume=true")
    assert (run_dir / metrics.METRICS).read_bytes() == (first / metrics.METRICS).read_bytes()


def test_a_run_starts_from_another(first, data, tmp_path):
    """Where that ended; then its own steps."""
    second = sft(data, tmp_path / "run", f"sft.weights={first}", "sft.epochs=0", "sft.steps=1")
    start = losses(second, "held_out")[0]
    assert start == pytest.approx(losses(first, "held_out")[12], rel=1e-5)
    cfg = configs.load_run(first)
    mesh = loop.meshes.make_mesh(cfg.mesh)
    got = loop.given_params("sft.weights", str(first), cfg.model, mesh, 0)
    jax.tree.map(np.testing.assert_array_equal, got, loop.newest_params(cfg, first, mesh))
    wide = cfg.model.model_copy(update={"width": 64})
    with pytest.raises(ConfigError, match="sft.weights=.*: a run of another"):
        loop.given_params("sft.weights", str(first), wide, mesh, 0)


def test_a_run_without_sft_is_no_sft(data, capsys):
    config = str(ROOT / "configs/quickstart.toml")
    assert cli.main(["sft", config]) == 2
    assert "sft.steps=0: must be above 0, or sft.epochs must" in capsys.readouterr().err


# --- the data alone


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(configs.asset_dir("package:quickstart/tokenizer"))


def texts(sequences, tokenizer):
    return [tokenizer.decode(s.ids) for s in sequences]


def test_epochs_take_every_trajectory_once(data, tokenizer):
    cfg = load(data, "sft.batch_size=5", "sft.epochs=2")
    sft_data = SFTData(cfg, FromFiles(cfg, tokenizer))
    assert sft_data.num_steps == 8  # 20 trajectories, 4 updates of 5
    epochs = [
        [text for step in steps for text in texts(sft_data.sequences(step), tokenizer)]
        for steps in (range(4), range(4, 8))
    ]
    assert len(set(epochs[0])) == 20 and sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    # Held out are both trajectories of two questions, and no step has them.
    held_out = texts(sft_data.held_out(), tokenizer)
    questions = {text.partition("\n")[0] for text in held_out}
    assert len(held_out) == 4 and len(questions) == 2
    assert not questions & {text.partition("\n")[0] for text in epochs[0]}


def test_held_out_questions_depend_on_the_seed_alone(data, tokenizer, tmp_path):
    def held_out(path, seed):
        cfg = load(path, f"seed={seed}")
        source = FromFiles(cfg, tokenizer)
        return sorted(texts(SFTData(cfg, source).held_out(), tokenizer))

    backwards = tmp_path / "rows.jsonl"
    backwards.write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS)))
    assert held_out(data, 0) == held_out(backwards, 0)
    assert len({str(held_out(data, seed)) for seed in range(4)}) > 1


def test_generated_trajectories_are_held_out_behind_the_others(data, tokenizer):
    cfg = load(data, "sft.num_trajectories=12", "sft.epochs=1", "sft.text_share=1.0")
    sft_data = SFTData(cfg, Generated(cfg, tokenizer, None))
    assert sft_data.num_steps == 2
    trained = [text for step in (0, 1) for text in texts(sft_data.sequences(step), tokenizer)]
    more = cfg.model_copy(update={"sft": cfg.sft.model_copy(update={"num_trajectories": 16})})
    everything = Generated(more, tokenizer, None)
    held_out = texts(sft_data.held_out(), tokenizer)
    assert held_out == texts([everything.sequence(i) for i in range(12, 16)], tokenizer)
    assert not set(held_out) & set(trained) and len(trained) == 12


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.batch_size=21", "sft.batch_size=21: must be at most 20"),
        ("sft.held_out=24", "sft.batch_size=6: must be at most 0"),
    ],
)
def test_too_few_trajectories(data, tokenizer, override, words):
    cfg = load(data, override)
    with pytest.raises(ConfigError, match=words):
        SFTData(cfg, FromFiles(cfg, tokenizer))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["sft.steps=3"], "sft.epochs=4: only without steps=3"),
        (["sft.optim.warmup_steps=3"], "sft.optim.warmup_share=0.1: only without warmup_steps=3"),
        (["sft.data=rows.jsonl"], "sft.data='rows.jsonl': no such file"),
        (["sft.data=[3]"], "sft.data=[3]: must be a string"),
    ],
)
def test_bad_configs(data, more, words):
    with pytest.raises(ConfigError) as caught:
        load(data, *more)
    assert words in str(caught.value)


def test_what_is_left_out_is_said(data, tokenizer, capsys):
    cfg = load(data)
    run = type("Run", (), {"cfg": cfg, "tokenizer": tokenizer, "display": Display()})()
    run.dir = data.parent
    loop.sft_data(run)
    out = capsys.readouterr().out
    assert "20 trajectories to train on, 4 held out" in out
    assert "1 too_long: left out; above" in out
