"""config.json: read in the words of transformers 4 and 5, written back, every mistake named."""

import json

import jax
import pytest

from cir_jax.config import YarnConfig, presets
from cir_jax.models import qwen
from cir_jax.models.hf_config import from_hf_config, read_config, to_hf_config
from cir_jax.models.hf_directory import CONFIG


def published(**fields):
    """Qwen2.5-7B's config.json, in the words of transformers 4."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    } | fields


def published_qwen3(**fields):
    """Qwen3-8B's."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    } | fields


def without(config, *fields):
    return {name: value for name, value in config.items() if name not in fields}


PLAIN = presets.PRESETS["Qwen2.5-7B"]
LONG = {"factor": 4.0, "original_max_position_embeddings": 32768}
WITH_YARN = PLAIN.model_copy(update={"yarn": YarnConfig(factor=4.0, original_length=32768)})
THETA = {"rope_theta": 1e6}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (published(), PLAIN),
        (published_qwen3(), presets.PRESETS["Qwen3-8B"]),
        # The window would begin after the last layer.
        (published(use_sliding_window=True), PLAIN),
        (published(rope_scaling={"type": "yarn"} | LONG), WITH_YARN),
        (published(rope_scaling={"rope_type": "yarn", "beta_fast": None} | LONG), WITH_YARN),
        (published(rope_scaling={"rope_type": "default"}), PLAIN),
        # transformers 5.
        (
            without(published(rope_parameters={"rope_type": "yarn"} | THETA | LONG), "rope_theta"),
            WITH_YARN,
        ),
        (
            without(published(rope_parameters=THETA, layer_types=["full_attention"]), "rope_theta"),
            PLAIN,
        ),
        (
            published(rope_scaling={"rope_type": "yarn", "factor": 2}),
            PLAIN.model_copy(update={"yarn": YarnConfig(factor=2.0, original_length=131072)}),
        ),
    ],
)  # fmt: skip
def test_config_is_read(config, expected):
    assert from_hf_config(config) == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (published(model_type="llama"), ["model_type='llama'", "'qwen2' or 'qwen3'"]),
        (published(model_type="qwen2_moe"), ["model_type='qwen2_moe'"]),
        (without(published(), "model_type"), ["model_type=None"]),
        (published(architectures=["Qwen2ForRewardModel"]), ["architectures=", "RewardModel"]),
        (published(hidden_act="gelu"), ["hidden_act='gelu'"]),
        (published(quantization_config={"bits": 4}), ["quantization_config=", "bits"]),
        (published(use_sliding_window=True, max_window_layers=7), ["sliding_window=131072", "7"]),
        (published(layer_types=["sliding_attention"]), ["layer_types=", "sliding_attention"]),
        (published(rope_scaling={"type": "linear", "factor": 2.0}), ["rope_type='linear'"]),
        (published(rope_scaling={"type": "dynamic"}), ["rope_scaling.rope_type='dynamic'"]),
        (published(rope_parameters={"rope_type": "llama3"}), ["rope_parameters.rope_type"]),
        (published(rope_scaling={"type": "yarn", "mscale": 2} | LONG), ["rope_scaling.mscale=2"]),
        (published(rope_scaling={"type": "yarn"}), ["rope_scaling.factor", "missing"]),
        (published(rope_scaling={"type": "yarn"} | LONG | {"factor": 0.5}), ["factor=0.5"]),
        (without(published(), "hidden_size"), ["hidden_size=None"]),
        (published(num_key_value_heads=5), ["num_kv_heads=5", "num_heads=28"]),
        (published(vocab_size=0), ["vocab_size=0"]),
        (published_qwen3(attention_bias=True), ["attention_bias=true"]),
    ],
)
def test_config_that_is_not_ours_names_field_and_value(tmp_path, config, words):
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        read_config(tmp_path)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / CONFIG)) and len(text.splitlines()) == 1
    assert all(word in text for word in words), text


# --- presets

# Numbers of parameters that the hub shows for the published weights.
NUM_PARAMS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}


@pytest.mark.parametrize("name", NUM_PARAMS)
def test_presets_have_the_published_sizes(name):
    shapes = jax.tree.leaves(qwen.abstract_params(presets.preset(name)))
    assert sum(x.size for x in shapes) == NUM_PARAMS[name]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_survive_a_config(name):
    cfg = presets.preset(name)
    assert from_hf_config(to_hf_config(cfg, "bfloat16")) == cfg


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"preset='qwen2.5-7b': unknown; nearest: Qwen2.5-7B"):
        presets.preset("qwen2.5-7b")
