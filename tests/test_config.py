"""Configs: what is accepted, and that each mistake is one line with key, value and a way out."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from cir_jax import cli
from cir_jax import config as configs
from cir_jax.config import PRESETS, Config, ConfigError, RolloutConfig, YarnConfig, max_calls_at
from cir_jax.rl.advantage import ADVANTAGES
from cir_jax.rl.kl import KL
from cir_jax.rl.loss import LOSS_MEANS

CONFIG = str(Path(__file__).parent.parent / "configs/quickstart_sft.toml")


def fields(section=Config, prefix=""):
    """(key, field) of every field that is no section."""
    for name, field in section.model_fields.items():
        if inner := configs.section_of(field):
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


FIELDS = dict(fields())


def value_at(cfg, key):
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


def message(*overrides, path=CONFIG):
    with pytest.raises(ConfigError) as caught:
        configs.load(path, overrides)
    text = str(caught.value)
    assert text and len(text.splitlines()) == 1
    assert "Input should" not in text and "Config" not in text  # pydantic's words, our classes
    return text


def test_fields_are_found():
    assert {"name", "model.width", "rl.optim.eps", "eval.max_calls"} <= set(FIELDS)


# --- what is accepted


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=7", 7),
        (" seed = 7 ", 7),
        ("seed=1_000", 1000),
        ("name=run", "run"),
        ("name='a = b'", "a = b"),
        ("name=a=b", "a=b"),
        ("resume=true", True),
        ("rl.optim.learning_rate=1e-6", 1e-6),
        ("rl.optim.clip_norm=2", 2.0),
        ("rl.optim.schedule=cosine", "cosine"),
        ('data.tasks=["sum", "lcm"]', ("sum", "lcm")),
        ("rollout.max_calls=0", 0),
        ("rollout.max_calls=[[0, 1], [20, 2]]", ((0, 1), (20, 2))),
        ("eval.max_calls=0", 0),
        ("data.template='Q: {question}'", "Q: {question}"),
    ],
)
def test_override(override, value):
    got = value_at(configs.load(CONFIG, [override]), override.split("=")[0].strip())
    assert got == value and type(got) is type(value)


def test_overrides_change_nothing_else():
    before = configs.to_tree(configs.load(CONFIG))
    after = configs.to_tree(configs.load(CONFIG, ["rl.optim.eps=0.5"]))
    assert after["rl"]["optim"].pop("eps") == 0.5
    assert before["rl"]["optim"].pop("eps") == 1e-8
    assert after == before


def test_the_last_override_of_a_key_wins():
    assert configs.load(CONFIG, ["seed=1", "seed=2"]).seed == 2


def test_override_of_a_section_that_the_file_leaves_out():
    assert "mesh" not in tomllib.loads(Path(CONFIG).read_text())
    assert configs.load(CONFIG, ["mesh.data=4"]).mesh.data == 4


def test_a_whole_section_may_be_given():
    cfg = configs.load(CONFIG, ["sandbox={timeout_s = 2.5}"])
    assert (cfg.sandbox.timeout_s, cfg.sandbox.num_workers) == (2.5, 2)


def test_an_optional_section_is_none_or_whole():
    assert configs.load(CONFIG).model.yarn is None
    given = ["model.yarn.factor=4", "model.yarn.original_length=32768"]
    cfg = configs.load(CONFIG, given)
    assert (cfg.model.yarn.factor, cfg.model.yarn.beta_fast) == (4.0, 32.0)
    assert configs.from_tree(json.loads(json.dumps(configs.to_tree(cfg)))) == cfg
    assert "model.yarn.original_length: missing" in message(given[0])


def test_override_of_a_loaded_config():
    cfg = configs.load(CONFIG)
    assert configs.override(cfg, ["seed=3", "sft.batch_size=5"]).sft.batch_size == 5
    assert configs.override(cfg, []) == cfg
    with pytest.raises(ConfigError, match="rl.steps"):
        configs.override(cfg, ["rl.stesp=3"])


@pytest.mark.parametrize("max_calls", ["0", "3", "[[0, 1], [5, 0]]"])
def test_round_trip_through_json(max_calls):
    cfg = configs.load(CONFIG, [f"rollout.max_calls={max_calls}", "mesh.fsdp=2"])
    assert configs.from_tree(json.loads(json.dumps(configs.to_tree(cfg)))) == cfg


def test_configs_are_frozen_and_hashable():
    cfg = configs.load(CONFIG)
    assert hash(cfg.model) == hash(configs.load(CONFIG).model)  # a static argument of jitted code
    with pytest.raises(ValueError, match="frozen"):
        cfg.seed = 1


# --- presets


def with_model(directory, *lines):
    """A config whose [model] has these lines."""
    path = directory / "run.toml"
    head = "name = 'x'\ntokenizer = 'package:quickstart/tokenizer'\ndata.tasks = ['sum']\n[model]\n"
    path.write_text(head + "\n".join(lines))
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_as_plain_values(tmp_path, name):
    cfg = configs.load(with_model(tmp_path, f"preset = '{name}'"))
    assert cfg.model == PRESETS[name]
    configs.save_run(cfg, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved["model"]) == set(configs.ModelConfig.model_fields)
    assert configs.load_run(tmp_path) == cfg


def test_keys_beside_a_preset_win(tmp_path):
    path = with_model(
        tmp_path,
        "vocab_size = 640",
        "preset = 'Qwen2.5-7B'",
        "[model.yarn]",
        "factor = 4.0",
        "original_length = 32768",
    )
    yarn = YarnConfig(factor=4.0, original_length=32768)
    expected = PRESETS["Qwen2.5-7B"].model_copy(update={"vocab_size": 640, "yarn": yarn})
    assert configs.load(path).model == expected
    cfg = configs.load(path, ["model.num_layers=2", "model.yarn.factor=2"])
    yarn = yarn.model_copy(update={"factor": 2.0})
    assert cfg.model == expected.model_copy(update={"num_layers": 2, "yarn": yarn})


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.num_layers=2", "model.preset=Qwen3-8B"],
        ["model.preset=Qwen3-8B", "model.num_layers=2"],
        ["model={preset = 'Qwen3-8B', num_layers = 2}"],
    ],
)
def test_override_of_a_preset_leaves_nothing_of_the_files(tmp_path, overrides):
    path = with_model(tmp_path, "preset = 'Qwen2.5-7B'")
    expected = PRESETS["Qwen3-8B"].model_copy(update={"num_layers": 2})
    assert configs.load(path, overrides).model == expected
    empty = with_model(tmp_path)
    assert configs.load(empty, overrides).model == expected


def test_the_files_own_keys_win_over_an_override_of_the_preset():
    given = tomllib.loads(Path(CONFIG).read_text())["model"]
    cfg = configs.load(CONFIG, ["model.preset=Qwen3-8B"])
    assert cfg.model == PRESETS["Qwen3-8B"].model_copy(update=given)
    assert (cfg.model.width, cfg.model.qk_norm) == (128, True)  # the file's, and the preset's
    cfg = configs.load(CONFIG, ["model={preset = 'Qwen3-8B'}"])
    assert cfg.model == PRESETS["Qwen3-8B"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Qwen2.5-6B", "model.preset='Qwen2.5-6B': unknown; nearest: Qwen2.5-7B"),
        ("qwen3-8b", "model.preset='qwen3-8b': unknown; nearest: Qwen3-8B"),
        ("''", f"model.preset='': unknown; known: {', '.join(PRESETS)}"),
        ("7", "model.preset=7: must be a string, in quotes; Model that"),
        ("['Qwen3-8B']", 'model.preset=["Qwen3-8B"]: must be a string, in quotes; Model that'),
    ],
)
def test_bad_preset(tmp_path, value, expected):
    assert message(f"model.preset={value}").startswith(expected)
    quoted = value if value[0] in "'[7" else f"'{value}'"
    path = with_model(tmp_path, f"preset = {quoted}")
    assert message(path=path).startswith(expected)


def test_preset_in_a_model_that_is_no_table():
    assert message("model=Qwen3-8B") == 'model="Qwen3-8B": must be a table [model]'
    expected = "model=3: must be a table [model]"
    assert message("model=3", "model.preset=Qwen3-8B") == expected


def test_mistakes_beside_a_preset_name_the_key(tmp_path):
    path = with_model(tmp_path, "preset = 'Qwen2.5-7B'")
    assert message("model.num_kv_heads=5", path=path) == (
        "model.num_kv_heads=5: must divide num_heads=28"
    )
    assert message("model.width=wide", path=path).startswith('model.width="wide": must be a whole')
    path = with_model(tmp_path, "preset = 'Qwen2.5-7B'", "with = 3")
    assert message(path=path) == "model.with=3: unknown key; nearest valid key: model.width"


def test_a_preset_cannot_be_put_under_a_resolved_config():
    cfg = configs.load(CONFIG)
    with pytest.raises(ConfigError, match='^model.preset="Qwen3-8B": no effect here'):
        configs.override(cfg, ["model.preset=Qwen3-8B"])
    cfg = configs.override(cfg, ["model={preset = 'Qwen3-8B'}"])
    assert cfg.model == PRESETS["Qwen3-8B"]


# --- the schedule of calls


@pytest.mark.parametrize(
    ("step", "calls"), [(0, 2), (99, 2), (100, 3), (199, 3), (200, 4), (10**6, 4)]
)
def test_default_schedule_is_the_papers(step, calls):
    assert max_calls_at(RolloutConfig().max_calls, step) == calls


@pytest.mark.parametrize("step", [0, 1, 1000])
def test_a_number_is_a_budget_for_all_steps(step):
    assert max_calls_at(0, step) == 0
    assert max_calls_at(3, step) == 3


@pytest.mark.parametrize(
    ("overrides", "calls"),
    [
        (["rollout.max_calls=0"], 0),
        (["rollout.max_calls=[[0, 1], [5, 4], [9, 2]]"], 4),
        (["rollout.max_calls=[[0, 1], [5, 4]]", "eval.max_calls=0"], 0),
        (["rollout.max_calls=1", "eval.max_calls=7"], 7),
    ],
)
def test_evaluation_allows_the_largest_budget_unless_told(overrides, calls):
    assert configs.eval_max_calls(configs.load(CONFIG, overrides)) == calls


# --- mistakes


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("rl.stesp=3", "rl.steps"),
        ("rl.optm.learning_rate=3", "rl.optim.learning_rate"),
        ("learning_rate=3", "rl.optim.learning_rate"),
        ("model.with=3", "model.width"),
        ("rollout.max_cals=3", "rollout.max_calls"),
        ("data.tasks.sum=3", "data.tasks"),
        ("rl..steps=3", "rl.steps"),
        ("sede=3", "seed"),
        ("model.presett=3", "model.preset"),
        ("model.pre_set=3", "model.preset"),
        ("preset=3", "model.preset"),
        ("model.preset.name=3", "model.preset"),
        ("rolout={slots = 3}", "rollout"),
        ("rollout={slots = 2, slotz = 3}", "rollout.slots"),
    ],
)
def test_unknown_key_names_the_nearest(override, nearest):
    text = message(override)
    assert text.endswith(f": unknown key; nearest valid key: {nearest}")
    assert "3" in text.split(": unknown")[0]


@pytest.mark.parametrize("key", FIELDS)
def test_nearest_key_of_one_letter_too_many(key):
    wrong = key + key[-1]
    assert message(f"{wrong}=1") == f"{wrong}=1: unknown key; nearest valid key: {key}"


def test_key_like_no_other_points_to_the_help():
    assert "--help" in message("qqqq=1")


@pytest.mark.parametrize(
    ("override", "value", "expected"),
    [
        ("rl.steps=-1", "-1", "greater than or equal to 0"),
        ("rl.steps=1.5", "1.5", "whole number"),
        ("rl.steps=true", "true", "whole number"),
        ("rl.steps=many", '"many"', "whole number"),
        ("rl.steps=[1]", "[1]", "whole number"),
        ("rl.optim.learning_rate=0", "0", "greater than 0"),
        ("rl.optim.learning_rate=-1e-6", "-1e-06", "greater than 0"),
        ("rl.optim.learning_rate=inf", "inf", "finite"),
        ("rl.optim.learning_rate=nan", "nan", "finite"),
        ("rl.optim.learning_rate=fast", '"fast"', "number"),
        ("rl.optim.beta1=1.5", "1.5", "less than or equal to 1"),
        ("rl.optim.schedule=linear", '"linear"', "'constant' or 'cosine'"),
        ("rl.dual_clip=1", "1", "greater than 1"),
        ("resume=1", "1", "true or false"),
        ("resume=True", '"True"', "true or false"),
        ("name=5", "5", "string"),
        ("name=2024-01-01", "2024-01-01", "string"),
        ("data.tasks=sum", '"sum"', "list"),
        ('data.tasks=["sum", 1]', '["sum", 1]', "string"),
        ("data.tasks=[]", "[]", "at least one"),
        ("data.template=hello", '"hello"', "{question}"),
        ("sandbox.timeout_s='5\ns'", r'''"'5\ns'"''', "number"),
        ("rollout.max_calls=x", '"x"', "[[step, calls], ...]"),
        ("rollout.max_calls=-1", "-1", ">= 0"),
        ("rollout.max_calls=1.5", "1.5", "whole number"),
        ("rollout.max_calls=[[0, -1]]", "[[0, -1]]", ">= 0"),
        ("rollout.max_calls=[[0, 1], [1]]", "[[0, 1], [1]]", "[[step, calls], ...]"),
        ("rollout.max_calls=[[5, 1]]", "[[5, 1]]", "start at 0"),
        ("rollout.max_calls=[[0, 1], [9, 2], [5, 3]]", "[[0, 1], [9, 2], [5, 3]]", "rise"),
        ("rollout.max_calls=[]", "[]", "start at 0"),
        ("eval.max_calls=x", '"x"', "whole number"),
        ("model=3", "3", "table [model]"),
        ("rl.optim=3", "3", "table [rl.optim]"),
        ("model.head_dim=3", "3", "even"),
        ("model.num_kv_heads=3", "3", "num_heads=4"),
        ("rl.advantage=ppo", '"ppo"', "gae"),
        ("rl.kl_estimator=k4", '"k4"', "k3"),
        ("rl.critic.lam=1.5", "1.5", "less than or equal to 1"),
        ("rl.minibatch_prompts=5", "5", "rollout.prompts_per_step=16"),
    ],
)
def test_bad_value_names_key_value_and_what_is_right(override, value, expected):
    text = message(override)
    assert text.startswith(f"{override.split('=')[0]}={value}: ")
    assert expected in text


@pytest.mark.parametrize("override", ["rl.steps", "", "=3", " = 3", "rl.steps:3"])
def test_override_without_key_or_equals(override):
    assert message(override) == f"override {override!r}: expected key.path=value"


def test_value_below_something_that_is_no_section():
    assert message("model=3", "model.width=2") == "model=3: must be a table [model]"


def test_missing_key_says_what_it_is():
    assert message("model={}") == (
        "model.vocab_size: missing; Rows of the embedding table, tokens; at least the "
        "tokenizer's size."
    )


@pytest.mark.parametrize("name", ["package:quickstart/tokeniser", "somewhere/else"])
@pytest.mark.parametrize("key", ["tokenizer", "sft.weights"])
def test_directory_that_is_not_there(key, name):
    text = message(f"{key}={name}")
    assert text.startswith(f"{key}=") and name.split(":")[-1] in text
    assert ("tokenizer" in text.partition("nearest: ")[2]) == name.startswith("package:")


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("seed = 1\nseed = 2\nname = 'x'\n", ["overwrite", "line 2", "seed = 2"]),
        ("[model]\nwidth = 1\n[model]\n", ["twice", "line 3", "[model]"]),
        ("seed = 1\nseed = 2", ["overwrite", "seed = 2"]),
        ("seed = [", ["seed = ["]),
        ("seed = one\n", ["line 1", "seed = one"]),
        ("model = 3\n", ["model=3", "table [model]"]),
        ("[mdl]\nwidth = 3\n", ["mdl={width = 3}", "nearest valid key: model"]),
        ("[rl.optim]\nlr = 3\n", ["rl.optim.lr=3", "nearest valid key: rl"]),
        ("'a\\nb' = 3\n", ["unknown key"]),
        ("", ["name: missing"]),
    ],
)
def test_bad_file(tmp_path, toml, words):
    path = tmp_path / "run.toml"
    required = "name = 'x'\ntokenizer = 'y'\nmodel = 3\n" if toml.startswith("model") else ""
    path.write_text(required or toml)
    text = message(path=path)
    assert all(word in text for word in words)


def test_a_file_changes_the_keys_of_its_base(tmp_path):
    (tmp_path / "run.toml").write_text(
        "base = 'more/middle.toml'\nname = 'x'\n[rl]\nsteps = 7\n[rl.optim]\nbeta1 = 0.5\n"
    )
    (tmp_path / "more").mkdir()
    base = os.path.relpath(CONFIG, tmp_path / "more")
    (tmp_path / "more/middle.toml").write_text(
        f"base = {base!r}\nseed = 9\n[rl.optim]\nbeta1 = 0.4\nbeta2 = 0.6\n"
    )
    cfg = configs.load(tmp_path / "run.toml", ["rl.optim.eps=0.5"])
    assert configs.differences(configs.load(CONFIG), cfg) == {
        "name": ("quickstart_sft", "x"),
        "seed": (0, 9),
        "rl.steps": (0, 7),
        "rl.optim.beta1": (0.9, 0.5),
        "rl.optim.beta2": (0.999, 0.6),
        "rl.optim.eps": (1e-8, 0.5),
    }


def test_bases_that_cannot_be(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("base = 'run.toml'\n")
    assert message(path=path) == f"{path}: base='run.toml': is a base of itself"
    path.write_text("base = 'rum.toml'\n")
    assert message(path=path).startswith(f"base='{tmp_path}/rum.toml': no such file")
    path.write_text("base = 3\n")
    assert message(path=path).startswith("base=3: must be a string")
    assert message("base=x.toml").startswith('base="x.toml": no effect here')


def test_file_that_is_no_text(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"name = '\xff'\n")
    assert f"{path}: not a TOML file" in message(path=path)


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "quickstart.toml").write_text("")
    text = message(path=tmp_path / "quikstart.toml")
    assert text.startswith(f"config='{tmp_path}/quikstart.toml': no such file")
    assert text.endswith(f"nearest: {tmp_path}/quickstart.toml")
    assert "directory" in message(path=tmp_path)
    assert "nearest" not in message(path=tmp_path / "none" / "x.toml")


# --- the help


@pytest.mark.parametrize("key", FIELDS)
def test_every_field_has_a_meaning_and_is_in_the_help(key):
    field = FIELDS[key]
    meaning = " ".join((field.description or "").split())
    assert meaning.endswith(".")
    default = "required" if field.is_required() else "default "
    lines = configs.describe().splitlines()
    (at,) = [n for n, line in enumerate(lines) if line.startswith(f"  {key}  ({default}")]
    assert lines[at + 1].strip() == meaning


def test_choices_are_those_of_the_dicts():
    for field, choices in (
        ("advantage", ADVANTAGES),
        ("loss_mean", LOSS_MEANS),
        ("kl_estimator", KL),
    ):
        assert set(get_args(configs.RLConfig.model_fields[field].annotation)) == set(choices)


def test_a_table_of_the_critics_optimizer_keeps_its_learning_rate():
    cfg = configs.load(CONFIG, ["rl.critic.optim={clip_norm = 0.5}"])
    assert cfg.rl.critic.optim.learning_rate == 1e-5 and cfg.rl.critic.optim.clip_norm == 0.5


def test_defaults_in_the_help_are_toml():
    shown = {
        line.split()[0]: line.partition("(default ")[2][:-1]
        for line in configs.describe().splitlines()
        if "(default " in line
    }
    for key in (
        "eval.max_calls",
        "resume_step",
        "model.yarn.attention_factor",
        "rl.importance_cap",
        "rl.loss_length",
        "rollout.max_context",
        "rollout.raise_calls_above",
    ):
        assert shown.pop(key) == "null"  # TOML has none
    for key, text in shown.items():
        default = json.loads(json.dumps(FIELDS[key].default))  # tuples as lists
        assert tomllib.loads(f"x = {text}")["x"] == default


def test_train_help_prints_every_key(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert set(FIELDS) <= set(out.split())
    lines = out.splitlines()
    at = lines.index("  model.preset  (optional)")
    assert lines[at - 1].startswith("[model]")
    meaning = lines[at + 1]
    assert "Qwen2.5-7B" in meaning and "Every other key of [model]" in meaning


# --- the command line


def run_cli(*argv):
    """Exit code, stdout, stderr of a command, and whether jax was imported for it."""
    code = (
        "import sys\nfrom cir_jax.cli import main\nstatus = main(sys.argv[1:])\n"
        "assert 'jax' not in sys.modules\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", ["train", "train-tokenizer"])
@pytest.mark.parametrize(
    ("path", "override", "words"),
    [
        ("configs/none.toml", "seed=1", ["configs/none.toml"]),
        (CONFIG, "rl.stesp=3", ["rl.stesp=3", "rl.steps"]),
        (CONFIG, "rl.steps=-3", ["rl.steps=-3"]),
        (CONFIG, "model.preset=Qwen2.5-6B", ["model.preset='Qwen2.5-6B'", "nearest: Qwen2.5-7B"]),
        (CONFIG, "rollout.max_calls=x", ['rollout.max_calls="x"']),
        (CONFIG, 'data.tasks=["sums"]', ["data.tasks", "'sums'", "nearest: sum"]),
    ],
)
def test_mistakes_exit_with_2_and_one_line_before_jax(tmp_path, command, path, override, words):
    out = [str(tmp_path / "out")] if command == "train-tokenizer" else []
    status, stdout, stderr = run_cli(command, path, *out, override)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("cir-jax: ") and stderr.count("\n") == 1
    assert all(word in stderr for word in words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [[], ["trian"], ["train"], ["train", CONFIG, "--steps", "3"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: cir-jax" in capsys.readouterr().err
