"""Golden batches: the trainer's own figures, every difference found and placed, veRL's layout."""

import functools
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from cir_jax import cli
from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax.config import ConfigError, MeshConfig
from cir_jax.parity import golden as layout
from cir_jax.parity.check import compare
from cir_jax.parity.export import batch_of, recorded
from cir_jax.parity.golden import COMPARED, SNIPPET, Golden
from cir_jax.parity.quantities import Weights, recompute
from cir_jax.records import Author, Problem, Trajectory
from cir_jax.train import compiled, learn
from cir_jax.train.state import init_params, init_state, reference_params

ROOT = Path(__file__).parent.parent
TINY = (
    "model.num_layers=1",
    "model.width=16",
    "model.head_dim=4",
    "model.mlp_width=16",
    "model.vocab_size=64",
    "mesh.data=8",
    "rl.minibatch_prompts=4",
    "rl.micro_rows=8",
    "rollout.slots=8",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=3",
    "rollout.max_response_tokens=20",
    "rollout.temperature=0.7",
    "data.max_prompt_tokens=4",
    "sft.micro_rows=8",
)
RECIPES = {
    "cir": (),
    "grpo": (
        "rl.advantage=grpo",
        "rl.loss_mean=sequence_mean",
        "rl.kl_coef=0.3",
        "rl.entropy_coef=0.1",
        "rl.importance_cap=1.2",
    ),
    "ppo": (
        "rl.advantage=gae",
        "rl.gamma=0.9",
        "rl.critic.lam=0.8",
        "rl.kl_coef=0.3",
        "rl.kl_in=reward",
        "rl.loss_mean=constant",
    ),
}


def tiny(*overrides):
    return configs.load(ROOT / "configs/quickstart.toml", TINY + overrides)


def step_of(seed=0, num_groups=4):
    """Groups of 3 of prompt, model turn, tool output, model turn; and rewards."""
    rng = np.random.default_rng(seed)

    def trajectory(problem, sample):
        parts = rng.integers(1, 5, 4)
        author = np.repeat([Author.PROMPT, Author.MODEL, Author.TOOL, Author.MODEL], parts)
        ids = rng.integers(0, 64, len(author)).astype(np.int32)
        logp = np.where(author == Author.MODEL, -4 - rng.random(len(author)), 0).astype(np.float32)
        return Trajectory(problem, sample, ids, author.astype(np.int8), logp, (), "eos")

    problems = [Problem(f"p{p}", "sum", "?", "0", "math") for p in range(num_groups)]
    groups = [[trajectory(problem, g) for g in range(3)] for problem in problems]
    return groups, rng.choice([-1.0, 1.0], (num_groups, 3)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def mesh():
    mesh = meshes.make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        yield mesh


@functools.cache
def made(mesh, recipe):
    """A batch with everything that can be computed, and its weights: the reference is another
    model's, the critic's values are drawn."""
    cfg = tiny(*RECIPES[recipe])
    policy, reference = (init_params(cfg.model, mesh, seed) for seed in (0, 1))
    weights = Weights(mesh, cfg.model, policy, reference if cfg.rl.kl_coef else None)
    groups, rewards = step_of()
    batch = batch_of(cfg, [t for group in groups for t in group], rewards.reshape(-1).tolist())
    arrays = dict(batch.arrays)
    if cfg.rl.advantage == "gae":
        values = np.random.default_rng(1).normal(size=batch.trained.shape)
        arrays["values"] = values.astype(np.float32) * batch.trained
    batch = Golden(batch.rl, batch.temperature, arrays)
    return Golden(batch.rl, batch.temperature, arrays | recompute(batch, weights)), weights


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_batch_agrees_with_itself(mesh, recipe, tmp_path):
    batch, weights = made(mesh, recipe)
    layout.write(tmp_path / "a.npz", batch)
    again = layout.read(tmp_path / "a.npz")
    assert (again.rl.advantage, again.temperature) == (batch.rl.advantage, 0.7)
    findings = compare(again, recompute(again, weights), weights, 1.0)
    assert [f.name for f in findings] == list(COMPARED)
    assert not any(f.differs for f in findings)
    left_out = {f.name for f in findings if not f.compared}
    assert (
        left_out
        == {
            "cir": {
                "log_probs",
                "ref_log_prob",
                "returns",
                "rollout_is_weights",
                "kl_loss",
                "vf_loss",
            },
            "grpo": {"log_probs", "returns", "vf_loss"},
            "ppo": {"log_probs", "rollout_is_weights", "kl_loss"},
        }[recipe]
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_figures_are_those_of_training(mesh, recipe):
    """The same trajectories through the learner: one update, of the whole batch."""
    cfg = tiny(*RECIPES[recipe], "rl.clip_low=0.01", "rl.clip_high=0.01")
    groups, rewards = step_of()
    policy = init_params(cfg.model, mesh, 0)
    other = init_params(cfg.model, mesh, 1)
    state = init_state(policy, cfg.model, mesh, compiled.rl_optimizer(cfg))
    reference = reference_params(other, cfg.model, cfg.compute, mesh) if cfg.rl.kl_coef else None
    critic = learn.init_critic(policy, cfg, mesh) if cfg.rl.advantage == "gae" else None
    learner = learn.Learner(cfg, mesh, reference)
    before = learner._before(
        learn.Models(state, critic), [t for g in groups for t in g], [list(range(12))]
    )
    _, figures, advantages = learner.learn(learn.Models(state, critic), groups, rewards, 0)

    batch = batch_of(cfg, [t for g in groups for t in g], rewards.reshape(-1).tolist())
    arrays = dict(batch.arrays)
    if critic is not None:
        values = np.zeros(batch.attended.shape)
        values[batch.attended] = np.concatenate(before["old_values"])
        arrays["values"] = batch.response(values) * batch.trained
    weights = Weights(mesh, cfg.model, policy, other if cfg.rl.kl_coef else None)
    here = recompute(Golden(batch.rl, batch.temperature, arrays), weights)
    pairs = {"loss": "loss", "grad_norm": "grad_norm", "entropy": "entropy"}
    pairs |= {"vf_loss": "critic/loss"} if critic is not None else {}
    for ours, theirs in pairs.items():
        np.testing.assert_allclose(here[ours], [figures[theirs]], rtol=2e-5, atol=1e-6)
    rows = [t for group in groups for t in group]
    for row, ours, theirs in zip(rows, here["advantages"], advantages, strict=True):
        R = row.num_response_tokens
        np.testing.assert_allclose(ours[:R], theirs[-R:], rtol=2e-5, atol=1e-5)


def cli_check(capsys, path, *argv):
    code = cli.main(["parity", "check", str(path), *map(str, argv)])
    done = capsys.readouterr()
    return code, done.out, done.err


def differing(out):
    return {line.split()[0] for line in out.splitlines() if "DIFFERS" in line}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_changed_quantity_is_found_and_placed(mesh, recipe, tmp_path, capsys):
    batch, weights = made(mesh, recipe)
    here = recompute(batch, weights)
    for name in COMPARED:
        if name not in batch or name not in here:
            continue
        wrong = batch[name].astype(np.float64).copy()
        axes = COMPARED[name].axes
        # The second place where it counts.
        places = np.argwhere(
            {"BT": batch.attended, "BR": batch.trained, "M": np.ones(wrong.shape, bool)}[axes]
        )
        at = tuple(places[min(1, len(places) - 1)])
        wrong[at] += 1
        changed = Golden(batch.rl, batch.temperature, dict(batch.arrays) | {name: wrong})
        findings = {f.name: f for f in compare(changed, here, weights, 1.0)}
        found = findings[name]
        assert found.differs and abs(found.largest - 1) < 1e-3, name
        place = f"row {at[0]} (uid p0)" if len(at) == 2 else "mini-batch 0"
        assert place in found.reason and "; 1 of " in found.reason
        assert [f.name for f in findings.values() if f.differs] == [name]
    wrong = batch["advantages"].copy()
    b, t = np.argwhere(batch.trained)[3]
    wrong[b, t] = np.nan
    path = tmp_path / "b.npz"
    layout.write(path, Golden(batch.rl, 1.0, dict(batch.arrays) | {"advantages": wrong}))
    code, out, _ = cli_check(capsys, path)
    assert code == 1 and "advantages" in differing(out)
    assert f"row {b} (uid p0), response token {t}" in out and "file nan" in out


def test_a_later_stage_is_computed_from_the_files_own_values(mesh):
    """Another estimator's advantages are the only thing that differs, not the loss of them."""
    batch, _ = made(mesh, "cir")
    doubled = dict(batch.arrays) | {"advantages": batch["advantages"] * 2}
    doubled["pg_loss"] = batch["pg_loss"] * 2
    doubled["loss"] = batch["loss"] * 2
    changed = Golden(batch.rl, batch.temperature, doubled)
    findings = compare(changed, recompute(changed, None), None, 1.0)
    assert [f.name for f in findings if f.differs] == ["advantages"]


def small(**other):
    """Two groups of two rows, in turn, padded on the left; a reward each on the last token."""
    arrays = {
        "settings": json.dumps({"rl": {"advantage": "grpo"}}),
        "input_ids": np.arange(20).reshape(4, 5),
        "attention_mask": np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]] * 2),
        "response_mask": np.array([[1, 0, 1], [1, 1, 0]] * 2),
        "uid": np.array(["b", "a", "b", "a"]),
        "token_level_scores": np.array([[0, 0, 1.0], [0, 1.0, 0], [0, 0, 0.0], [0, -1.0, 0]]),
    }
    return arrays | other


def test_rows_of_a_group_need_not_lie_together():
    here = recompute(layout.golden(small()), None)
    # Group b has rewards 1 and 0: mean 0.5, deviation 1/sqrt(2), so +-0.7071; group a 1 and -1:
    # deviation sqrt(2), the same.
    root = 0.5**0.5
    expected = [[root, 0, root], [root, root, 0], [-root, 0, -root], [-root, -root, 0]]
    np.testing.assert_allclose(here["advantages"], expected, atol=2e-6)
    # Row 0 begins at its second token.
    assert here["position_ids"][0].tolist() == [0, 0, 1, 2, 3]


def test_the_loss_needs_no_weights_where_log_probabilities_are_given():
    """Ratios e and 1/e at A = +-0.7071: clipped to 1.28 and, where A < 0, to 0.8."""
    old = np.full((4, 3), -2.0)
    arrays = small(old_log_probs=old, log_probs=old + np.array([1.0, -1.0, 1.0, -1.0])[:, None])
    here = recompute(layout.golden(arrays), None)
    # Rows 0 and 1 gain: -1.28 and -1/e; rows 2 and 3 lose: e (below the dual clip) and 0.8.
    root = 0.5**0.5
    loss = root * (-1.28 - np.exp(-1) + np.exp(1) + 0.8) / 4
    np.testing.assert_allclose(here["loss"], [loss], rtol=1e-5)
    np.testing.assert_allclose(here["pg_clipfrac"], [0.5])
    np.testing.assert_allclose(here["pg_clipfrac_lower"], [0.0])
    np.testing.assert_allclose(here["ppo_kl"], [0.0], atol=1e-7)
    by_row = recompute(layout.golden(arrays | {"minibatch": np.arange(4)}), None)
    np.testing.assert_allclose(by_row["loss"][0], -1.28 * root, rtol=1e-5)
    np.testing.assert_allclose(by_row["ppo_kl"], [-1, 1, -1, 1], rtol=1e-6)


@pytest.mark.parametrize(
    "other, parts",
    [
        ({"settings": "{"}, ["settings", "JSON"]),
        ({"settings": '{"rl": {"clip": 1}}'}, ["rl.clip", "there are", "clip_low"]),
        ({"settings": '{"rl": {"clip_low": 2}}'}, ["rl.clip_low=2"]),
        ({"settings": '{"temperature": 0}'}, ["temperature=0"]),
        ({"old_logprobs": np.zeros((4, 3))}, ["'old_logprobs'", "unknown", "old_log_probs"]),
        ({"values": np.zeros((4, 5))}, ["'values'", "(4, 5)", "(4, 3)"]),
        ({"uid": np.array(["a"] * 3)}, ["'uid'", "(3,)", "(4,)"]),
        ({"attention_mask": np.array([[1, 0, 1, 1, 1]] * 4)}, ["row 0", "lie together"]),
        ({"response_mask": np.array([[1, 1, 1]] * 4)}, ["row 1", "attention_mask is 0"]),
        ({"response_mask": np.full((4, 3), 2)}, ["'response_mask'", "0 and 1"]),
        ({"responses": np.zeros((4, 3))}, ["'responses'", "row 0, token 0", "2"]),
        ({"author": np.full((4, 5), 2)}, ["row 0, token 0", "author is 2"]),
        ({"minibatch": np.array([0, 2, 2, 2])}, ["number 1"]),
        ({"input_ids": np.full((4, 5), 0.5)}, ["'input_ids'", "whole numbers"]),
    ],
)
def test_errors_name_array_and_place(other, parts):
    with pytest.raises(ValueError) as caught:
        layout.golden(small(**other))
    for part in parts:
        assert part in str(caught.value)


def test_groups_of_two_sizes():
    uneven = small(uid=np.array(["b", "a", "b", "b"]))
    with pytest.raises(ValueError, match="group b has 3 rows.*'grpo' needs groups of one size"):
        recompute(layout.golden(uneven), None)
    alone = json.dumps({"rl": {"advantage": "reinforce_pp"}})
    assert "advantages" in recompute(layout.golden(uneven | {"settings": alone}), None)


def test_a_file_that_is_none(tmp_path, capsys):
    path = tmp_path / "a.npz"
    for content in (b"hello", b"PK\x03\x04"):
        path.write_bytes(content)
        code, _, err = cli_check(capsys, path)
        assert code == 2 and "a.npz: not an .npz" in err
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    code, _, err = cli_check(capsys, path)
    assert code == 2 and "a.npz: not an .npz" in err
    np.savez(path, **{k: v for k, v in small().items() if k != "uid"})
    code, _, err = cli_check(capsys, path)
    assert code == 2 and "array 'uid': missing, [B]" in err


def test_what_is_absent_is_said(tmp_path, capsys):
    path = tmp_path / "a.npz"
    np.savez(path, **small(grad_norm=np.array([1.0]), returns=np.zeros((4, 3))))
    code, out, _ = cli_check(capsys, path)
    said = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert "not compared: not in the file" in said["advantages"]
    assert "not compared: needs --model" in said["grad_norm"]
    assert "has no critic" in said["returns"]


def test_tolerances_are_scaled(tmp_path, capsys):
    path = tmp_path / "a.npz"
    advantages = recompute(layout.golden(small()), None)["advantages"]
    # 1e-3 off 0.7071, of which 1e-5 + 1e-4 of it may be off: 8e-5.
    np.savez(path, **small(advantages=advantages + 1e-3))
    for scale, code in ((10, 1), (20, 0)):
        assert cli_check(capsys, path, "--tolerance-scale", scale)[0] == code


def test_verls_batches_are_written_by_the_snippet(tmp_path, capsys):
    """It stands in the README and in the help, and what it writes is a golden batch."""
    assert SNIPPET in (ROOT / "README.md").read_text()
    scope = {}
    exec(SNIPPET, scope)
    arrays = {k: v for k, v in small().items() if k not in ("settings", "uid")}
    arrays |= {"prompts": np.zeros((4, 2)), "old_log_probs": np.full((4, 3), -1.0)}
    # Group by group, with veRL's own object dtype for the groups' names.
    tensors = {k: torch.tensor(v) for k, v in arrays.items()}
    tensors["old_log_probs"] = tensors["old_log_probs"].to(torch.bfloat16)
    uid = np.array(["b", "a", "b", "a"], dtype=object)
    data = types.SimpleNamespace(batch=tensors, non_tensor_batch={"uid": uid})
    path = tmp_path / "verl.npz"
    scope["write_golden"](path, data, {"rl": {"advantage": "grpo"}}, pg_loss=0.0)
    batch = layout.read(path)
    assert batch["old_log_probs"][0, 0] == -1.0 and "prompts" not in batch
    # At ratio 1 the loss is minus the mean advantage, which is 0.
    code, out, _ = cli_check(capsys, path)
    assert code == 0 and "pg_loss" in out and not differing(out)


def test_transformers_and_torch_agree(tmp_path, capsys):
    """GRPO with clips, by torch on the shipped weights, written as veRL would; then checked."""
    from transformers import AutoModelForCausalLM

    weights = ROOT / "cir_jax/assets/quickstart/cold_start"
    model = AutoModelForCausalLM.from_pretrained(
        weights, dtype=torch.float32, attn_implementation="eager"
    )
    rng = np.random.default_rng(0)
    # Rows b, a, b, a of 5 tokens, as `small` has them, padded on both sides.
    ids = torch.tensor(rng.integers(0, 640, (4, 5)))
    given = small(input_ids=ids.numpy())
    attended, mask = (torch.tensor(given[k]) for k in ("attention_mask", "response_mask"))
    positions = (attended.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attended, position_ids=positions).logits
    every = torch.log_softmax(logits[:, 1:4] / 0.5, -1)
    logp = every.gather(-1, ids[:, 2:, None])[..., 0]
    old = (logp.detach() + torch.tensor(rng.normal(0, 0.7, (4, 3)))).float()
    # As in test_rows_of_a_group_need_not_lie_together.
    advantages = torch.tensor([0.5**0.5, 0.5**0.5, -(0.5**0.5), -(0.5**0.5)])[:, None] * mask
    ratio = torch.exp(logp - old)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
    loss = torch.where(advantages < 0, torch.minimum(loss, -3 * advantages), loss)
    entropy = -(every.exp() * every).sum(-1)
    num_tokens = mask.sum()
    total = ((loss - 0.1 * entropy) * mask).sum() / num_tokens
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    settings = {"temperature": 0.5, "rl": {"advantage": "grpo", "entropy_coef": 0.1}}
    path = tmp_path / "torch.npz"
    arrays = given | {
        "settings": json.dumps(settings),
        "position_ids": positions.numpy(),
        "old_log_probs": old.numpy(),
        "log_probs": logp.detach().numpy(),
        "advantages": advantages.numpy(),
        "pg_loss": [((loss * mask).sum() / num_tokens).item()],
        "entropy": [((entropy * mask).sum() / num_tokens).item()],
        "loss": [total.item()],
        "grad_norm": [norm.item()],
    }
    np.savez(path, **arrays)
    code, out, _ = cli_check(capsys, path, "--model", weights)
    assert code == 0, out
    assert sum(line.endswith("  ok") for line in out.splitlines()) == 7


def sample_line(t, step, score):
    return json.dumps(
        {
            "step": step,
            "problem_id": t.problem.problem_id,
            "sample": t.sample,
            "answer": "0",
            "score": score,
            "stop_reason": t.stop_reason,
            "ids": t.ids.tolist(),
            "author": t.author.tolist(),
            "logp": t.logp.tolist(),
        }
    )


def test_a_problem_that_is_drawn_twice_makes_two_groups():
    groups, _ = step_of(num_groups=1)
    cfg = tiny("rl.minibatch_prompts=1")
    batch = batch_of(cfg, groups[0] + groups[0], [1.0] * 6)
    assert batch["uid"].tolist() == ["p0"] * 3 + ["p0#1"] * 3
    assert batch["minibatch"].tolist() == [0, 0, 0, 1, 1, 1]


def test_recorded_rollouts(tmp_path):
    groups, _ = step_of()
    rows = [t for sample in zip(*groups, strict=True) for t in sample]
    path = tmp_path / "samples.jsonl"
    lines = [sample_line(t, step, 1.0) for step in (3, 4) for t in rows]
    path.write_text("\n".join(lines) + "\n")
    trajectories, rewards = recorded(path, None)
    # One step's, the rows of a group together.
    assert [t.problem.problem_id for t in trajectories] == [
        f"p{p}" for p in range(4) for _ in "123"
    ]
    assert rewards == [1.0] * 12 and len(recorded(path, 3)[0]) == 12
    with pytest.raises(ConfigError, match="no rollout of step 5"):
        recorded(path, 5)
    path.write_text(lines[0] + "\n{}\n")
    with pytest.raises(ConfigError, match=r"samples.jsonl, line 2: .*KeyError\('step'\)"):
        recorded(path, None)


@pytest.mark.slow
def test_export_and_check_by_the_command(tmp_path, capsys):
    """With the shipped weights; of rollouts that they did not make, so that clips act."""
    groups, rewards = step_of(num_groups=2)
    rows = [t for group in groups for t in group]
    path, out = tmp_path / "samples.jsonl", tmp_path / "golden.npz"
    lines = [sample_line(t, 1, float(r)) for t, r in zip(rows, rewards.reshape(-1), strict=True)]
    path.write_text("\n".join(lines) + "\n")
    overrides = ["mesh.data=8", "rollout.samples_per_prompt=3"]
    argv = [ROOT / "configs/quickstart.toml", out, *overrides, "--rollouts", path, "--off-policy"]
    assert cli.main(["parity", "export", *map(str, argv)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    batch = layout.read(out)
    assert batch["pg_clipfrac"][0] + batch["pg_clipfrac_lower"][0] > 0
    weights = ROOT / "cir_jax/assets/quickstart/cold_start"
    code, text, _ = cli_check(capsys, out, "--model", weights)
    assert code == 0, text
    said = {line.split()[0]: line for line in text.splitlines()}
    for name in ("log_probs", "grad_norm", "loss", "advantages", "entropy"):
        assert said[name].endswith("ok")
    assert "not compared: of other weights" in said["old_log_probs"]
    # Other log-probabilities of the update are found; the old ones are an input.
    arrays = dict(batch.arrays) | {"log_probs": batch["log_probs"] + 0.1}
    layout.write(out, Golden(batch.rl, batch.temperature, arrays))
    code, text, _ = cli_check(capsys, out, "--model", weights)
    assert (
        code == 1
        and {"log_probs", "ppo_kl"} <= differing(text)
        and "old_log_probs" not in differing(text)
    )
    code, _, err = cli_check(capsys, out, "--model", tmp_path)
    assert code == 2 and "holds neither a run nor weights" in err
