"""Every model of the table is transformers': logits, padding, packing, gradients, generation."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models_table import (
    MODELS,
    TOKENIZER,
    assert_near,
    assert_same,
    one_device,
    pack_rows,
    params_of,
    random_ids,
    settings,
)
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from cir_jax.config import ModelConfig, YarnConfig
from cir_jax.models import hf, logprob, qwen
from cir_jax.models.cache import make_cache
from cir_jax.models.hf_config import read_config
from cir_jax.models.hf_directory import INDEX, WEIGHTS

LENGTH = 24
TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small to be shared among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Pair(NamedTuple):
    cfg: ModelConfig
    params: qwen.Params
    theirs: PreTrainedModel


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def pair(request, tmp_path_factory):
    """One model, ours and as transformers loads our export."""
    cfg, directory = request.param, tmp_path_factory.mktemp("export")
    hf.export(params_of(cfg), cfg, directory, TOKENIZER)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert type(theirs).__name__ == ("Qwen3" if cfg.qk_norm else "Qwen2") + "ForCausalLM"
    return Pair(cfg, params_of(cfg), theirs)


@functools.partial(jax.jit, static_argnums=1)
def logits_of_rows(params, cfg, ids, positions, segment_ids):
    hidden = qwen.forward(params, cfg, ids, positions, segment_ids)
    flat = logprob.logits(hidden.reshape(-1, cfg.width), qwen.head_table(params))
    return flat.reshape(*ids.shape, -1)


def ours(pair, ids, positions, segment_ids):
    """Logits. All calls share one shape, hence one compilation per model."""
    rows = np.zeros((3, 4, LENGTH), np.int32)
    rows[:, : len(ids)] = ids, positions, segment_ids
    return np.asarray(logits_of_rows(pair.params, pair.cfg, *rows))[: len(ids)]


def transformers_logits(pair, ids, **arguments):
    tensors = {name: torch.tensor(np.asarray(value)) for name, value in arguments.items()}
    with torch.no_grad():
        return pair.theirs(torch.tensor(np.asarray(ids, np.int64)), **tensors).logits.numpy()


def test_the_table_has_every_pair_of_settings():
    rows = [settings(cfg) for cfg in MODELS.values()]
    values = [("qwen2", "qwen3"), (True, False), (1, 2, 7), (True, False)]
    for a, b in itertools.combinations(range(4), 2):
        assert {(row[a], row[b]) for row in rows} == {*itertools.product(values[a], values[b])}


def test_what_transformers_saves_is_read_back(pair, tmp_path):
    pair.theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).exists() and not (tmp_path / WEIGHTS).exists()
    assert read_config(tmp_path) == pair.cfg
    assert_same(hf.load(tmp_path, pair.cfg, one_device()), pair.params)


def test_logits(pair):
    ids = np.repeat(random_ids((1, LENGTH)), 2, axis=0)
    ids[1, 0] = (ids[1, 0] + 1) % pair.cfg.vocab_size
    expected = transformers_logits(pair, ids)
    assert_near(ours(pair, *pack_rows(ids[:, None], LENGTH)), expected, TOLERANCE)
    # The rows differ in their first token alone, and the last logits show it.
    assert np.abs(expected[1, -1] - expected[0, -1]).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows(pair, side):
    """attention_mask and position_ids are to transformers what segments and positions are here."""
    lengths = np.array([[LENGTH], [15], [7], [1]])
    at = np.arange(LENGTH)[None]
    real = at < lengths if side == "right" else at >= LENGTH - lengths
    ids = np.where(real, random_ids(real.shape), 0)
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    expected = transformers_logits(pair, ids, attention_mask=real, position_ids=positions)
    assert_near(ours(pair, ids, positions, real)[real], expected[real], TOLERANCE)


def test_packed_rows(pair):
    segments = [[random_ids(n, seed=n) for n in row] for row in ([9, 1, 7], [LENGTH], [5, 6, 13])]
    got = ours(pair, *pack_rows(segments, LENGTH))
    for r, row in enumerate(segments):
        ends = np.cumsum([len(ids) for ids in row])
        for ids, end in zip(row, ends, strict=True):
            expected = transformers_logits(pair, ids[None])[0]
            assert_near(got[r, end - len(ids) : end], expected, TOLERANCE)


@functools.partial(jax.jit, static_argnums=1)
@jax.value_and_grad
def cross_entropy(params, cfg, ids, positions, segment_ids):
    """Mean over the tokens that a token of their segment precedes."""
    hidden = qwen.forward(params, cfg, ids, positions, segment_ids)[:, :-1]
    logp, _ = logprob.token_logprobs(hidden, qwen.head_table(params), ids[:, 1:], 1.0)
    counts = (segment_ids[:, 1:] > 0) & (positions[:, 1:] > 0)
    return -jnp.sum(logp * counts) / jnp.sum(counts)


def test_gradients(pair, tmp_path):
    """Of every parameter, under transformers' names; rows are packed here and padded there."""
    segments = [random_ids(n, seed=n) for n in (9, 15, 20)]
    rows = pack_rows([segments[:2], segments[2:]], LENGTH)
    loss, gradient = cross_entropy(pair.params, pair.cfg, *rows)
    hf.export(gradient, pair.cfg, tmp_path, TOKENIZER)
    got = load_file(tmp_path / WEIGHTS)

    ids, _, real = (torch.tensor(x).long() for x in pack_rows([[s] for s in segments], LENGTH))
    pair.theirs.zero_grad()
    labels = torch.where(real > 0, ids, -100)
    expected_loss = pair.theirs(ids, attention_mask=real, labels=labels).loss
    expected_loss.backward()
    assert_near(loss, expected_loss.item(), 1e-5)
    parameters = dict(pair.theirs.named_parameters())
    assert got.keys() == parameters.keys()
    for name, x in parameters.items():
        expected = x.grad.numpy()
        assert np.abs(expected).max() > 0, name
        difference = np.abs(got[name] - expected).max()
        assert difference <= TOLERANCE * np.abs(expected).max(), name


NEW = 64
PROMPTS = 13, 9  # tokens
CHUNK = 4


@functools.partial(jax.jit, static_argnums=1)
def continued(params, cfg, ids, positions, cache):
    """The likeliest token after each."""
    hidden, cache = qwen.forward_cached(params, cfg, ids, positions, cache)
    flat = logprob.logits(hidden.reshape(-1, cfg.width), qwen.head_table(params))
    return jnp.argmax(flat, axis=-1).reshape(ids.shape), cache


def generate(pair, prompts):
    """Greedy continuations: prompts in chunks, then a token at a time, at each row's own place."""
    longest = max(map(len, prompts))
    cache = make_cache(pair.cfg, len(prompts), longest + NEW, "float32")
    token = np.zeros(len(prompts), np.int32)
    for start in range(0, longest, CHUNK):
        span = np.arange(start, start + CHUNK)
        # A position outside the cache is padding.
        positions = np.array([np.where(span < len(p), span, longest + NEW) for p in prompts])
        ids = np.array([np.resize(p[start:], CHUNK) for p in prompts])
        after, cache = continued(pair.params, pair.cfg, ids, positions, cache)
        for row, prompt in enumerate(prompts):
            if start < len(prompt) <= start + CHUNK:
                token[row] = after[row, len(prompt) - 1 - start]
    tokens, position = [token], np.array([[len(p)] for p in prompts])
    for _ in range(NEW - 1):
        after, cache = continued(pair.params, pair.cfg, tokens[-1][:, None], position, cache)
        tokens, position = [*tokens, np.asarray(after)[:, 0]], position + 1
    return np.stack(tokens, axis=1)


def test_greedy_generation(pair):
    # A seed with which no step of any model is close to a tie.
    prompts = [random_ids(n, seed=249) for n in PROMPTS]
    longest = max(PROMPTS)
    ids, mask = np.zeros((2, len(PROMPTS), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    expected = pair.theirs.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
    )[:, longest:].numpy()
    assert expected.shape == (len(PROMPTS), NEW)
    np.testing.assert_array_equal(generate(pair, prompts), expected)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert len(set(tokens)) > 5
        logits = transformers_logits(pair, np.concatenate([prompt, tokens])[None])[0]
        top = np.sort(logits[len(prompt) - 1 : -1], axis=-1)
        # Logits that differ by less than the tolerance cannot have another largest one.
        assert (top[:, -1] - top[:, -2]).min() > 2 * TOLERANCE * np.abs(logits).max()


def test_yarn_frequencies():
    """At the sizes and settings of Qwen2.5's long-context configs, all defaults left out."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    rope["original_max_position_embeddings"] = 32768
    config = Qwen2Config(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](config)
    yarn = YarnConfig(factor=4.0, original_length=32768)
    got, ours = qwen.rope_frequencies(128, 1e6, yarn)
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-6)
    assert ours == pytest.approx(scale)
    # 0.1 ln 4 + 1
    assert ours == pytest.approx(1.1386294)
    plain, one = qwen.rope_frequencies(128, 1e6, None)
    assert one == 1.0 and got[0] == plain[0] and got[-1] == plain[-1] / 4
