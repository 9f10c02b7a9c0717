"""`cir-jax import-verl`: launches as bash and hydra read them, and what becomes of each key."""

import functools
import json
import os
import subprocess
import tomllib
from pathlib import Path

import pytest

from cir_jax import cli
from cir_jax import config as configs
from cir_jax.config import ConfigError
from cir_jax.config.templates import TEMPLATES
from cir_jax.verl import hydra, shell
from cir_jax.verl.keys import KEYS, Launch, key_of
from cir_jax.verl.translate import to_toml, translate

ROOT = Path(__file__).parent
ACTOR = "actor_rollout_ref.actor."
ROLLOUT = "actor_rollout_ref.rollout."

# As CIR's reference launches: options that a loop reads, a default in an `if`, continued lines.
CIR_SCRIPT = """\
#!/bin/bash
set -x
export NCCL_IB_DISABLE=0
while [[ $# -gt 0 ]]; do
    case $1 in
        --model) MODEL="$2"; shift 2 ;;
        *) break ;;
    esac
done
if [ -z "$MODEL" ]; then
    MODEL=/models/Qwen2.5-Math-7B   # the base model
fi
BATCH=128
LENGTH=$((4 * 1024))

python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=reinforce_plus_plus_baseline \\
    algorithm.kl_ctrl.kl_coef=0 \\
    data.train_files= \\
    data.val_files= \\
    data.train_batch_size=$BATCH \\
    data.shuffle=True \\
    data.max_prompt_length=1024 \\
    data.max_response_length=${LENGTH} \\
    data.truncation='left' \\
    +data.seed=80 \\
    actor_rollout_ref.model.path=$MODEL  \\
    actor_rollout_ref.actor.optim.lr=1e-6 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \\
    actor_rollout_ref.actor.use_dynamic_bsz=True \\
    actor_rollout_ref.actor.use_kl_loss=False \\
    actor_rollout_ref.actor.kl_loss_coef=0 \\
    actor_rollout_ref.actor.entropy_coeff=0 \\
    actor_rollout_ref.actor.clip_ratio_low=0.2 \\
    actor_rollout_ref.actor.clip_ratio_high=0.28 \\
    actor_rollout_ref.actor.state_masking=True \\
    +actor_rollout_ref.actor.fsdp_config.grad_offload=False \\
    actor_rollout_ref.rollout.temperature=1.0 \\
    actor_rollout_ref.rollout.gpu_memory_utilization=0.75 \\
    actor_rollout_ref.rollout.max_model_len=15361 \\
    actor_rollout_ref.rollout.n=16 \\
    +actor_rollout_ref.rollout.generate_method=CIR \\
    +actor_rollout_ref.rollout.max_call_time=2 \\
    actor_rollout_ref.rollout.val_kwargs.do_sample=True \\
    trainer.critic_warmup=0 \\
    trainer.logger=['console','wandb'] \\
    trainer.experiment_name=cir \\
    trainer.val_before_train=True \\
    trainer.save_freq=10 \\
    reward_model.reward_manager=still_code_format \\
    trainer.total_epochs=30
"""

# As DAPO's recipe: defaults of variables, sums, a job's command around the trainer's.
DAPO_SCRIPT = """\
#!/usr/bin/env bash
set -euo pipefail
prompts=512
max_prompt=$((1024 * 2))
max_response=$((1024 * 20))
MODEL=${MODEL:-"${HOME}/verl/models/Qwen2.5-32B"}

ray job submit --no-wait -- python3 -m recipe.dapo.main_dapo \\
    data.train_batch_size=${prompts} data.gen_batch_size=$((prompts * 3)) \\
    data.max_prompt_length=${max_prompt} data.max_response_length=${max_response} \\
    actor_rollout_ref.model.path="${MODEL}" \\
    +actor_rollout_ref.model.override_config.attention_dropout=0. \\
    algorithm.adv_estimator=grpo \\
    algorithm.filter_groups.enable=True algorithm.filter_groups.metric=acc \\
    actor_rollout_ref.actor.clip_ratio_c=10.0 \\
    actor_rollout_ref.actor.optim.lr_warmup_steps=10 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=32 \\
    actor_rollout_ref.rollout.top_k="-1" \\
    reward_model.reward_manager=dapo \\
    reward_model.overlong_buffer.enable=True reward_model.overlong_buffer.len=4096 \\
    reward_model.overlong_buffer.penalty_factor=1.0 \\
    trainer.total_training_steps=200
"""


def arguments(script, *given, environment=None, **variables):
    return list(shell.training_command(script, given, environment or {}, variables).arguments)


# As ToRL's: GRPO with a KL term of weight 0, programs asked for by a stop word.
TORL_SCRIPT = """\
policy=/root/models/Qwen2.5-Math-1.5B
batch=128; samples=16
calls=1
kl=0.0
out=/root/out/${name:-torl}
mkdir -p $out

python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    algorithm.kl_ctrl.kl_coef=$kl \\
    data.train_files=$out/train.parquet \\
    data.train_batch_size=$batch \\
    data.max_prompt_length=400 \\
    data.max_response_length=3072 \\
    data.template_type=tir \\
    actor_rollout_ref.model.path=$policy \\
    actor_rollout_ref.actor.ppo_mini_batch_size=1024 \\
    actor_rollout_ref.actor.use_kl_loss=True \\
    actor_rollout_ref.actor.kl_loss_coef=$kl \\
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \\
    actor_rollout_ref.actor.entropy_coeff=0 \\
    actor_rollout_ref.rollout.num_llm_calls_available=$calls \\
    actor_rollout_ref.rollout.n=$samples \\
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \\
    actor_rollout_ref.ref.fsdp_config.param_offload=True \\
    trainer.samples_save_path=$out/samples \\
    trainer.resume_mode=auto \\
    trainer.total_training_steps=500 2>&1 | tee $out/log
"""


def launched(*words):
    return "python -m verl.trainer.main_ppo " + " ".join(words) + "\n"


FAKES = {
    "python3": "shift 2\nfor word; do printf '%s\\0' \"$word\"; done\n",
    "ray": 'while [ $# -gt 0 ] && [ "$1" != -- ]; do shift; done\nshift\n"$@"\n',
}


def of_bash(script, tmp_path, *given, home="/home/me"):
    """The same words by bash, with a `python3` that prints what it was given."""
    for name, text in FAKES.items():
        fake = tmp_path / name
        fake.write_text(f"#!/bin/sh\n{text}")
        fake.chmod(0o755)
    path = tmp_path / "launch.sh"
    path.write_text(script)
    done = subprocess.run(
        ["bash", str(path), *given],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        cwd=tmp_path,
    )
    return done.stdout.decode().rpartition("\0")[0].split("\0")


SCRIPTS = {
    "cir": CIR_SCRIPT,
    "arguments": 'A=1\npython3 -m verl.trainer.main_ppo a.b=$A "$@" c.d=2 2>&1 | cat\n',
    "options": 'while getopts "m:n:" o; do\ncase $o in m) M=$OPTARG;; esac\ndone\n'
    "shift $((OPTIND - 1))\npython3 -m verl.trainer.main_ppo m=${M:-1} n=2\n",
    "trimmed": "M=org/a.b.c\npython3 -m verl.trainer.main_ppo a=${M##*/} b=${M#*/} c=${M%.*}"
    " d=${M%%.*} e=${M%x} f=${M#?r}\n",
    "items": 'M=(x y)\nN=1\npython3 -m verl.trainer.main_ppo a=${M[1]} b="${M[0]}" c=${N[0]}'
    " d=${M[2]}.\n",
    "inner": 'N=4\nenv X=1 bash -c "\n  cd . && python3 -m verl.trainer.main_ppo a=$N \\\n'
    """    b=\\"x y\\" c='z  z'\n" || exit 1\n""",
    "rest": 'python3 -m verl.trainer.main_ppo a.b=1 "${@:1}" c.d=2 ${*:1} | cat\n',
    "arrays": 'A=(a.b=1 a.c="x y" # why\n a.d=3 " e ")\nA+=(a.e=4)\nB="a.f=5 a.g=6 "\nC=()\n'
    'python3 -m verl.trainer.main_ppo "${A[@]}" $B x${B}y "$B" "" \'\' $B"" ${A[@]}z'
    ' "${C[@]}" $A ${A} "${A[*]}" ${C:-none} "${B[*]}"\n',
    "quotes": "V=v\npython3 -m verl.trainer.main_ppo a.a='$V' a.b=\"'$V' \\\"q\\\" \\$V\" a.c=\\$V"
    " a.d=['x','y'] a.e=\"['x', 'y']\" a.f=${V}w a.g=$V/w a.h=\"a\\\nb\" \\\n  a.i=i\n",
    "defaults": ': \nE=""\npython3 -m verl.trainer.main_ppo a=${N:-1} b=${E:-2} c=${E-3}'
    ' d=${N-"4 5"} l=${N-4 5} e=${E:+6} f=${HOME:+7} g=${1:-8} h=${M:=9} i=$M\n',
    "documents": "cat <<-'END' >/dev/null\n it's a.b=1\n\tEND\n"
    "cat <<X <<Y >/dev/null\n'\nX\n\"\nY\n"
    "python3 -m verl.trainer.main_ppo a='{b: 1, c: 2}' d=\"{e,f}\" g={h} <<<'x y'\n",
    "sums": "A=7\npython3 -m verl.trainer.main_ppo a=$((A * (2 + 3))) b=$((-A / 2)) c=$((-A % 4))"
    " d=$((${A} ** 2)) e=$(( $A - 1 ))\n",
    "tests": 'X=b\nif [ "$X" = a ]; then Y=1; elif [[ $X == b ]]; then Y=2; else Y=3; fi\n'
    '[ -z "$Z" ] && Z=4\n[ -n "$Z" ] || Z=5\nif [ 2 -gt 10 ]; then Y=6\nfi\n'
    '[ -z "$Z" ] && W=1 && Y=7\n[ "${U-u}" = u ] || Y=9\n'
    'if [ ! -n "$Y" ]; then Y=10; fi\n[[ "$X" == *Q* ]] && Y=11\n[[ $X != [^b]* ]] || Y=12\n'
    '[[ "$X" == "*" ]] && Y=13\n[[ $HOME == /h*e ]] && Y=14\n[ "$X" = "?" ] && Y=15\n'
    "mkdir -p . || Y=8\nFOO=1 python3 -m verl.trainer.main_ppo y=$Y z=$Z\n",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_words_are_those_of_bash(name, tmp_path):
    given = ["k.l=a b", "k.m=c"] if name in ("arguments", "rest") else []
    ours = arguments(SCRIPTS[name], *given, environment={"HOME": "/home/me"})
    assert ours == of_bash(SCRIPTS[name], tmp_path, *given)
    assert len(ours) > 1


# Launches as they are published, whole.
LAUNCHES = {path.stem: path.read_text() for path in sorted((ROOT / "launches").glob("*.sh"))}


@pytest.mark.parametrize("name", LAUNCHES)
def test_words_of_a_whole_launch_are_those_of_bash(name, tmp_path):
    """But for values that hold the output of a command, which are not known."""
    (tmp_path / "data/still3").mkdir(parents=True)
    (tmp_path / "data/still3/train.parquet").touch()  # the script looks for it
    environment = {"HOME": str(tmp_path), "PWD": str(tmp_path)}
    command = shell.training_command(LAUNCHES[name], environment=environment)
    unknown = {entry.key for entry in command.unknown}
    words = of_bash(LAUNCHES[name], tmp_path, home=tmp_path)
    assert len(words) == len(command.arguments) + len(unknown) > 25
    assert list(command.arguments) == [w for w in words if w.partition("=")[0] not in unknown]
    assert unknown == (
        {"trainer.experiment_name", "trainer.default_local_dir"} if name == "cir" else set()
    )


# What each of them has to come to, besides what they leave to veRL.
OF_LAUNCHES = {
    "cir": {
        "name": "qwen2.5-math-7b-calls2",
        "rl.advantage": "reinforce_pp_baseline",
        "rl.clip_high": 0.28,
        "rollout.max_calls": 2,
        "rollout.boundary": "fence",
        "rollout.samples_per_prompt": 16,
        "rollout.max_response_tokens": 4096,
        "rl.minibatch_prompts": 64,
        "rl.train_tool_tokens": False,
        "data.files": ("data/still3/train.parquet",),
        "data.eval_files": ("data/aime24.parquet", "data/aime25.parquet"),
        "data.chat": False,
        "seed": 42,
    },
    "torl": {
        "name": "rl.grpo_qwen.math.1.5b_torl_data_numcall1",
        "rl.advantage": "grpo",
        "rl.clip_high": 0.2,
        "rl.minibatch_prompts": 128,
        "rl.kl_coef": 0.0,
        "rl.steps": 500,
        "rollout.max_calls": 1,
        "rollout.boundary": "stop_word",
    },
    "dapo": {
        "name": "DAPO-Qwen2.5-7B",
        "rl.advantage": "grpo",
        "rl.dual_clip": 10.0,
        "rl.optim.weight_decay": 0.1,
        "rl.optim.warmup_steps": 160,
        "rollout.refill_rounds": 29,
        "rollout.max_calls": 0,
        "reward.overlong_buffer": 4096,
        "data.chat": True,
    },
    "grpo": {
        "name": "qwen2_5_3b_function_rm",
        "rl.advantage": "grpo",
        "rl.kl_coef": 0.001,
        "rl.kl_in": "loss",
        "rl.kl_estimator": "k3",
        "rollout.samples_per_prompt": 5,
        "checkpoint.every": 20,
    },
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_whole_launch_becomes_a_config(name, tmp_path):
    environment = {"HOME": str(tmp_path), "PWD": str(tmp_path)}
    command = shell.training_command(LAUNCHES[name], environment=environment)
    translation = translate(command, name="file")
    assert not translation.lines("lacking", "unknown")
    cfg = written(translation, tmp_path, weights=True)
    assert {key: value_at(cfg, key) for key in OF_LAUNCHES[name]} == OF_LAUNCHES[name]


def value_at(cfg, key):
    return functools.reduce(getattr, key.split("."), cfg)


def test_an_unknown_value_is_named_before_what_depends_on_it():
    command = shell.training_command(launched(*BASE[:2], "trainer.total_training_steps=$(steps)"))
    with pytest.raises(ConfigError, match=r"total_training_steps=\$\(steps\): line 1: commands"):
        translate(command, tasks=["sum"], name="run")


def test_a_name_that_is_not_known_is_the_scripts(tmp_path):
    for name in ("$(date)", "$NAME"):
        command = shell.training_command(launched(*BASE, f"trainer.experiment_name={name}"))
        assert setting(translate(command, tasks=["sum"], name="file"), "name") == "file"


def test_an_instruct_models_shape_is_its_bases():
    translation = translated("actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct")
    assert setting(translation, "model.preset") == "Qwen2.5-7B"
    assert setting(translation, "sft.weights") == "weights/Qwen2.5-7B-Instruct"
    said = line(translation, "actor_rollout_ref.model.path").outcome.text
    assert "cir-jax import-hf Qwen/Qwen2.5-7B-Instruct weights/Qwen2.5-7B-Instruct" in said


def test_arguments_go_to_the_end_where_the_script_has_no_place_for_them():
    assert arguments(launched("a.b=1"), "a.b=2") == ["a.b=1", "a.b=2"]


def test_variables_are_given_or_found_in_the_environment():
    script = "A=1\n" + launched("a=$A", "b=$B")
    assert arguments(script, environment={"A": "2", "B": "3"}) == ["a=1", "b=3"]
    assert arguments(script, A="4", B="5") == ["a=4", "b=5"]


@pytest.mark.parametrize(
    "script, parts",
    [
        (launched("a.b=$NOWHERE"), ["line 1", "NOWHERE", "not set"]),
        ("X=${ELSE}\n" + launched("a.b=$X"), ["line 2", "ELSE"]),
        ("X=$(ls)\n" + launched("a.b=$X"), ["$(ls)", "not run"]),
        (launched("a.b=`ls`"), ["`ls`", "not run"]),
        ("if [ -f x ]; then\nX=1\nfi\n" + launched("a.b=$X"), ["X", "line 2", "may not be run"]),
        ("for X in 1 2; do\nY=$X\ndone\n" + launched("a.b=$Y"), ["Y", "line 2"]),
        (launched("a.b=${X/a/b}"), ["${X/a/b}"]),
        (launched("a.b=$((1 / 0))"), ["1 / 0"]),
        (launched("a.b=$((N * 2))"), ["N", "not set"]),
        (launched("a.b=$'x'"), ["$'...'"]),
        (launched("a.b={c: 1,d: 2}".replace(" ", "")), ["quote it"]),
    ],
)
def test_what_cannot_be_known_is_named(script, parts):
    command = shell.training_command(script)
    (unknown,) = command.unknown
    assert (unknown.key, command.arguments) == ("a.b", ())
    for part in parts:
        assert part in unknown.reason


@pytest.mark.parametrize(
    "script, parts",
    [
        (launched("a.b=1", "$OTHERS"), ["line 1", "OTHERS", "not set"]),
        (launched("a.b=1 \\\n# a.c=2 \\\n a.d=3"), ["line 3", "a.d=", "cuts it off"]),
        (launched("a.b='x"), ["line 1", "not closed"]),
        ("echo main_ppo\n", ["has none"]),
        (launched("a=1") + launched("a=2"), ["lines 1, 2"]),
    ],
)
def test_what_is_no_launch(script, parts):
    with pytest.raises(ValueError) as caught:
        shell.training_command(script)
    for part in parts:
        assert part in str(caught.value)


def test_an_unknown_variable_that_is_not_used_is_no_error():
    assert arguments("X=$(date)\nY=$X\n" + launched("a.b=1")) == ["a.b=1"]


def test_an_unknown_value_matters_where_the_result_depends_on_it():
    script = launched(
        *BASE,
        "trainer.experiment_name=run-$(date +%s)",
        'trainer.default_local_dir="$CKPT/x"',
        "data.train_files=$DATA/train.parquet",
        ACTOR + "kl_loss_coef=$KL",
    )
    options = {"tasks": ["sum"], "name": "file"}
    translation = translate(shell.training_command(script), **options)
    assert setting(translation, "name") == "run"
    assert line(translation, "trainer.default_local_dir").value == "$CKPT/x"
    assert line(translation, "data.train_files").value == "$DATA/train.parquet"
    for more in (ROLLOUT + "n=$N", ACTOR + "use_kl_loss=$N", "a.b=$N"):
        command = shell.training_command(script.rstrip() + f" {more}")
        with pytest.raises(ConfigError) as caught:
            translate(command, **options)
        assert str(caught.value).startswith(f"{more}: line 1: ")
        assert "--var N=VALUE" in str(caught.value)
    given = shell.training_command(script.rstrip() + f" {ROLLOUT}n=$N", [ROLLOUT + "n=3"])
    assert setting(translate(given, **options), "rollout.samples_per_prompt") == 3


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-6", 1e-6),
        ("0.", 0.0),
        ("-1", -1),
        ("True", True),
        ("null", None),
        ("", ""),
        ("/a/b-c.parquet", "/a/b-c.parquet"),
        ("['a, b',\"c\"]", ["a, b", "c"]),
        ("[console,wandb]", ["console", "wandb"]),
        ("[[1, 2], []]", [[1, 2], []]),
        ("{a: 1, b: [x, y]}", {"a": 1, "b": ["x", "y"]}),
        ("'1'", "1"),
        ("${data.seed}", "${data.seed}"),
        ("v1.0", "v1.0"),
    ],
)
def test_values(text, value):
    parsed = hydra.parse_value(text)
    assert parsed == value and type(parsed) is type(value)


def test_overrides_and_options():
    overrides, options = hydra.parse(["a.b=1", "+c=x=y", "++d.e=[1]", "~f", "--config-name=g"])
    assert [(o.key, o.value, o.deleted) for o in overrides] == [
        ("a.b", 1, False),
        ("c", "x=y", False),
        ("d.e", [1], False),
        ("f", None, True),
    ]
    assert options == ["--config-name=g"]
    for bad in ("a.b", "a.b=[1", "a.b='x", "a.b=[1] 2"):
        with pytest.raises(ValueError, match="a.b"):
            hydra.parse([bad])


# Enough for a launch to be translated; what a test adds wins.
BASE = (
    "algorithm.adv_estimator=reinforce_plus_plus_baseline",
    "actor_rollout_ref.model.path=Qwen/Qwen3-8B",
    "trainer.total_training_steps=100",
)


def translated(*overrides, **options):
    command = shell.Command("main_ppo", (*BASE, *overrides))
    return translate(command, tasks=["sum"], name="run", **options)


def setting(translation, key):
    return translation.settings[key][0]


def line(translation, key):
    (found,) = (line for line in translation.report if line.key == key)
    return found


@pytest.mark.parametrize(
    "override, category, ours",
    [
        (ACTOR + "clip_ratio_low=0.1", "honoured", {"rl.clip_low": 0.1}),
        (ACTOR + "optim.betas=[0.9,0.95]", "honoured", {"rl.optim.beta2": 0.95}),
        (ROLLOUT + "max_model_len=800", "honoured", {"rollout.max_context": 800}),
        ("trainer.max_actor_ckpt_to_keep=3", "honoured", {"checkpoint.keep": 3}),
        (ROLLOUT + "top_k=-1", "translated", {"rollout.top_k": 0}),
        (ROLLOUT + "top_k=5", "honoured", {"rollout.top_k": 5}),
        # veRL's own 1024 prompts a step, 256 an update: 4 updates a step.
        (ACTOR + "optim.lr_warmup_steps=10", "translated", {"rl.optim.warmup_steps": 40}),
        (ACTOR + "ppo_mini_batch_size=2048", "translated", {"rl.minibatch_prompts": 1024}),
        (
            ROLLOUT + "num_llm_calls_available=1",
            "translated",
            {"rollout.boundary": "stop_word", "rollout.result.max_chars": 256},
        ),
        ("trainer.experiment_name='a b/c'", "translated", {"name": "a-b-c"}),
        # veRL's own min_lr_ratio is 0.
        (ACTOR + "optim.warmup_style=cosine", "honoured", {"rl.optim.final_share": 0.0}),
        ("data.truncation=left", "approximated", {}),
        ("trainer.test_freq=5", "approximated", {}),
        ("reward_model.reward_manager=dapo", "approximated", {}),
        (
            "+actor_rollout_ref.model.override_config.max_position_embeddings=9000",
            "honoured",
            {"model.max_positions": 9000},
        ),
        ("actor_rollout_ref.model.lora_rank=8", "honoured", {"model.lora.alpha": 16.0}),
        (ROLLOUT + "gpu_memory_utilization=0.5", "ignored", {}),
        ("+reward_model.reward_kwargs.overlong_buffer_cfg.len=9", "ignored", {}),
        # veRL's manager "naive" has no such term.
        ("+reward_model.reward_kwargs.overlong_buffer_cfg.enable=True", "ignored", {}),
        ("algorithm.filter_groups.enable=False", "honoured", {"rollout.refill_rounds": 0}),
        ("algorithm.filter_groups.metric=acc", "ignored", {}),
        ("algorithm.lam=0.9", "ignored", {}),
        (ACTOR + "shuffle=True", "approximated", {"rl.shuffle": True}),
        ("trainer.critic_warmup=5", "ignored", {}),
        ("algorithm.rollout_is=True", "ignored", {}),
        (ACTOR + "state_masking=False", "ignored", {}),
        ("trainer.logger=['console']", "ignored", {}),
        ("critic.optim.lr=1e-5", "ignored", {}),
        (ACTOR + "kl_loss_coef=0.01", "ignored", {}),
        (ACTOR + "use_kl_loss=True", "translated", {"rl.kl_coef": 0.001, "rl.kl_in": "loss"}),
        (ACTOR + "entropy_coeff=0.001", "honoured", {"rl.entropy_coef": 0.001}),
        (ACTOR + "tis_imp_ratio_cap=2", "honoured", {"rl.importance_cap": 2.0}),
        ("algorithm.adv_estimator=grpo", "translated", {"rl.advantage": "grpo"}),
        ("algorithm.adv_estimator=gae", "translated", {"rl.advantage": "gae"}),
        ("algorithm.adv_estimator=rloo_vectorized", "translated", {"rl.advantage": "rloo"}),
        (ACTOR + "ppo_epochs=2", "honoured", {"rl.epochs": 2}),
        (ACTOR + "ppo_mini_batch_size=100", "lacking", {}),
        (ACTOR + "clip_ratio=0.1", "lacking", {}),
        (
            ACTOR + "loss_agg_mode=seq-mean-token-mean",
            "approximated",
            {"rl.loss_mean": "sequence_mean"},
        ),
        (ROLLOUT + "repetition_penalty=1.1", "lacking", {}),
        (ROLLOUT + "multi_turn.enable=True", "lacking", {}),
        ("algorithm.use_kl_in_reward=True", "translated", {"rl.kl_in": "reward"}),
        ("algorithm.adv_estimator=remax", "lacking", {}),
        ("custom_reward_function.path=my.py", "lacking", {}),
        ("reward_model.enable=True", "lacking", {}),
        ("~trainer.logger", "lacking", {}),
        (ACTOR + "clip_ratio_hihg=0.3", "unknown", {}),
    ],
)
def test_categories(override, category, ours):
    translation = translated(override)
    entry = line(translation, override.lstrip("+~").partition("=")[0])
    assert entry.outcome.category == category, entry
    assert entry.outcome.text
    for key, value in ours.items():
        assert setting(translation, key) == value


def test_a_key_without_effect_depends_on_the_one_that_gives_it_one():
    kl = (ACTOR + "use_kl_loss=True", ACTOR + "kl_loss_coef=0.01", ACTOR + "kl_loss_type=mse")
    on = translated(*kl)
    assert [setting(on, f"rl.kl_{key}") for key in ("coef", "in", "estimator")] == [
        0.01,
        "loss",
        "k2",
    ]
    both = translated(*kl, "algorithm.use_kl_in_reward=True")
    assert line(both, "algorithm.use_kl_in_reward").outcome.category == "lacking"
    adaptive = translated("algorithm.kl_ctrl.type=adaptive", "algorithm.use_kl_in_reward=True")
    assert line(adaptive, "algorithm.kl_ctrl.type").outcome.category == "lacking"
    for name in ("grpo", "grpo_vectorized"):
        centred = (f"algorithm.adv_estimator={name}", "algorithm.norm_adv_by_std_in_grpo=False")
        assert setting(translated(*centred), "rl.advantage") == "dr_grpo"
    # ToRL's way to have none.
    zero = translated(ACTOR + "use_kl_loss=True", ACTOR + "kl_loss_coef=0.0")
    assert line(zero, ACTOR + "use_kl_loss").outcome.category == "honoured"
    assert not zero.lines("lacking", "unknown")


@pytest.mark.parametrize(
    ("overrides", "category"),
    [
        (["algorithm.kl_ctrl.kl_coef=0.001"], "lacking"),
        (["algorithm.kl_ctrl.kl_coef=0.0"], "ignored"),
        (["algorithm.kl_ctrl.kl_coef=0.001", "algorithm.use_kl_in_reward=False"], "ignored"),
        (["algorithm.kl_ctrl.kl_coef=0.001", ACTOR + "use_kl_loss=True"], "ignored"),
        ([], "ignored"),
        # A fork of the time when it had an effect.
        ([ROLLOUT + "max_call_time=2"], "approximated"),
    ],
)
def test_kl_in_the_reward_of_older_versions(overrides, category):
    entry = line(translated(*overrides), "algorithm.kl_ctrl.kl_coef")
    assert entry.outcome.category == category


def test_tool_tokens_in_the_loss():
    # The reference's own value, where it runs programs.
    for given in ((), (ACTOR + "state_masking=False",)):
        translation = translated(ROLLOUT + "generate_method=CIR", *given)
        assert setting(translation, "rl.train_tool_tokens") is True


def test_the_last_of_two_wins():
    translation = translated(ROLLOUT + "n=4", "++" + ROLLOUT + "n=8")
    assert setting(translation, "rollout.samples_per_prompt") == 8
    assert line(translation, ROLLOUT + "n").value == "8"
    # Of two names of one setting, too.
    style, kind = ACTOR + "optim.warmup_style", ACTOR + "optim.lr_scheduler_type"
    translation = translated(f"{style}=constant", f"{kind}=constant", f"{style}=cosine")
    assert setting(translation, "rl.optim.schedule") == "cosine"


def test_interpolation():
    both = ("data.train_batch_size=64", ACTOR + "ppo_mini_batch_size=${data.train_batch_size}")
    assert setting(translated(*both), "rl.minibatch_prompts") == 64
    default = translated("data.max_response_length=${data.max_prompt_length}")
    assert setting(default, "rollout.max_response_tokens") == 512
    for value in ("${data.seed}", "${data.nowhere}"):
        with pytest.raises(ConfigError, match="data.seed"):
            translated(f"data.seed={value}")


def test_verl_own_values_are_written_out():
    # ppo_trainer.yaml's, which are not ours: 1024 prompts, 256 an update, one sample, 512 tokens,
    # no clip-higher, no programs.
    translation = translated()
    own = {
        "rollout.prompts_per_step": 1024,
        "rl.minibatch_prompts": 256,
        "rollout.samples_per_prompt": 1,
        "data.max_prompt_tokens": 512,
        "rollout.max_response_tokens": 512,
        "rl.clip_high": 0.2,
        "rollout.max_calls": 0,
    }
    assert {key: setting(translation, key) for key in own} == own
    assert line(translation, ACTOR + "clip_ratio_high").given is False
    assert translation.settings["rl.clip_high"][1] == ACTOR + "clip_ratio_high, veRL's own"


def test_every_key_of_a_launch_is_in_the_report():
    command = shell.training_command(CIR_SCRIPT)
    words = command.arguments
    translation = translate(command, tasks=["sum"], name="run")
    given = [entry.key for entry in translation.report if entry.given]
    assert given == [word.lstrip("+").partition("=")[0] for word in words]


def test_the_table_is_consistent():
    launches = Launch({}, ("sum",), ""), Launch({}, (), "")
    for name, key in KEYS.items():
        assert key_of(name) is key
        for launch in launches if key.always else ():
            outcome = key.rule(key.default, launch)
            assert outcome.text and "\n" not in outcome.text
    assert key_of("nowhere.at.all") is None
    # A key of its own before a pattern that it matches.
    assert key_of(ACTOR + "fsdp_config.model_dtype") is not key_of(ACTOR + "fsdp_config.fsdp_size")


@pytest.mark.parametrize(
    "override, parts",
    [
        (ROLLOUT + "n=XXXX", [ROLLOUT + "n=XXXX", "whole number"]),
        (ACTOR + "optim.lr=fast", ["optim.lr=fast", "number"]),
        (ACTOR + "ppo_mini_batch_size=0", ["ppo_mini_batch_size=0", "at least 1"]),
        (ACTOR + "optim.betas=[0.9]", ["optim.betas"]),
    ],
)
def test_values_that_no_launch_can_have(override, parts):
    with pytest.raises(ConfigError) as caught:
        translated(override)
    for part in parts:
        assert part in str(caught.value)


def test_other_trainers_and_other_defaults():
    with pytest.raises(ConfigError, match="main_eval"):
        translate(shell.Command("main_eval", BASE), tasks=["sum"], name="run")
    translation = translated("--config-name=mine", "--config-path=there")
    assert line(translation, "--config-name").outcome.category == "lacking"
    assert line(translation, "--config-path").outcome.category == "ignored"
    plain = translated("--config-name=ppo_trainer.yaml")
    assert line(plain, "--config-name").outcome.category == "ignored"


@pytest.mark.parametrize(
    "path, preset, source",
    [
        ("Qwen/Qwen3-8B", "Qwen3-8B", "Qwen/Qwen3-8B"),
        ("someone/qwen2.5-math-7b", "Qwen2.5-Math-7B", "someone/qwen2.5-math-7b"),
        ("/data/DeepSeek-R1-Distill-Qwen-7B/", None, "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
    ],
)
def test_model_by_name(path, preset, source):
    translation = translated(f"actor_rollout_ref.model.path={path}")
    preset = preset or path.strip("/").split("/")[-1]
    assert setting(translation, "model.preset") == preset
    assert setting(translation, "sft.weights") == setting(translation, "tokenizer")
    said = line(translation, "actor_rollout_ref.model.path").outcome.text
    assert f"cir-jax import-hf {source} weights/{preset}" in said


def test_a_model_that_is_none_of_ours_says_how_to_import():
    translation = translated("actor_rollout_ref.model.path=/m/llama")
    said = line(translation, "actor_rollout_ref.model.path").outcome
    assert said.category == "lacking"
    assert "import-hf" in said.text and "--weights" in said.text


def test_a_model_directory_says_its_shape(tmp_path):
    # Neither is a preset's: rope_theta and the norms' epsilon are read, not guessed.
    config = {
        "model_type": "qwen2",
        "vocab_size": 640,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 7777.0,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for options in ({}, {"weights": str(tmp_path)}):
        path = "/m/llama" if options else tmp_path
        translation = translated(f"actor_rollout_ref.model.path={path}", **options)
        assert setting(translation, "model.rope_theta") == 7777.0
        assert setting(translation, "sft.weights") == str(tmp_path)
        cfg = written(translation, tmp_path)
        assert (cfg.model.width, cfg.model.norm_eps) == (64, 1e-5)


def written(translation, tmp_path, weights=False):
    """The config that is read from what is written; weights: any directory stands for them."""
    path = tmp_path / "out.toml"
    path.write_text(to_toml(translation, ["From a launch.", "", "  an entry " + "word " * 40]))
    given = [f"{key}={str(tmp_path)!r}" for key in ("tokenizer", "sft.weights") if weights]
    return configs.load(path, given)


def run(capsys, *argv):
    code = cli.main(["import-verl", *map(str, argv)])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_the_reference_launch_gives_the_papers_settings(tmp_path, capsys):
    script = tmp_path / "run.sh"
    script.write_text(CIR_SCRIPT)
    weights = tmp_path / "weights"
    weights.mkdir()
    out = tmp_path / "cir.toml"
    code, stdout, report = run(
        capsys, script, "--tasks", "sum,primes", "--weights", weights, "-o", out
    )
    assert (code, stdout) == (0, f"{out}\n")
    cfg = configs.load(out)
    # SPEC of the paper's run: 128 x 16, mini-batches of 64, T = 1, AdamW at a constant 1e-6.
    rollout, rl, optim = cfg.rollout, cfg.rl, cfg.rl.optim
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, rl.minibatch_prompts) == (
        128,
        16,
        64,
    )
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1.0, 0)
    assert (optim.learning_rate, optim.schedule, optim.warmup_steps) == (1e-6, "constant", 0)
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm) == (0.9, 0.999, 0.01, 1)
    assert (cfg.data.max_prompt_tokens, rollout.max_response_tokens) == (1024, 4096)
    # The model names 4096 positions; the launch's rows are longer.
    assert (cfg.model, rollout.max_context) == (configs.preset("Qwen2.5-Math-7B"), 5120)
    assert (rl.advantage, rl.clip_low, rl.clip_high, rl.dual_clip) == (
        "reinforce_pp_baseline",
        0.2,
        0.28,
        3.0,
    )
    assert (rollout.max_calls, rollout.boundary) == (2, "fence")
    assert (cfg.data.template, cfg.data.tasks) == (TEMPLATES["cir"], ("sum", "primes"))
    assert (cfg.checkpoint.every, cfg.name, cfg.seed, rl.steps) == (10, "cir", 80, 300)
    # All else is as the paper's run is by default, where the sections say so.
    default = configs.RLConfig()
    assert rl == default.model_copy(update={"optim": optim})
    assert optim == configs.OptimConfig()
    # The top of the file says what is not the same, and the report all keys.
    top = out.read_text().split("name =")[0]
    assert "run.sh" in top and "data.truncation=left" in top and "max_call_time=2" in top
    assert "gpu_memory" not in top
    for key in ("gpu_memory_utilization", "trainer.logger", ROLLOUT + "n=16"):
        assert key in report
    for category in ("approximated", "translated", "honoured", "ignored"):
        assert f"\n{category} (" in "\n" + report


def test_dapo_is_all_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    script = tmp_path / "dapo.sh"
    script.write_text(DAPO_SCRIPT)
    code, stdout, _ = run(capsys, script, "--tasks", "sum")
    assert code == 0
    tree = tomllib.loads(stdout)
    assert (tree["name"], tree["model"]) == ("dapo", {"preset": "Qwen2.5-32B"})
    # 512 / 32 updates a step, 10 steps.
    assert tree["rl"]["optim"]["warmup_steps"] == 160
    assert (tree["rl"]["dual_clip"], tree["rl"]["steps"]) == (10.0, 200)
    assert tree["rl"]["advantage"] == "grpo"
    assert tree["reward"] == {"overlong_buffer": 4096, "overlong_factor": 1.0}
    # No limit in the launch: ten rounds, as the recipe's own.
    assert tree["rollout"]["refill_rounds"] == 9
    limited = "algorithm.filter_groups.max_num_gen_batches=2"
    _, stdout, _ = run(capsys, script, limited, "--tasks", "sum")
    # Two batches of 3 x 512 problems are six of 512.
    assert tomllib.loads(stdout)["rollout"]["refill_rounds"] == 5


def test_what_is_lacking_is_left_out_by_force_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    script = tmp_path / "dapo.sh"
    script.write_text(DAPO_SCRIPT.replace("reward_model.overlong_buffer.penalty_factor=1.0", ""))
    lacking = ("algorithm.filter_groups.metric=length", "custom_reward_function.path=my.py")
    code, stdout, report = run(capsys, script, *lacking, "--tasks", "sum")
    assert (code, stdout) == (2, "")
    last = report.splitlines()[-1]
    for entry in (
        "algorithm.filter_groups.enable=True: dynamic sampling by length",
        "reward_model.overlong_buffer.enable=True: overlong shaping without",
        "custom_reward_function.path=my.py",
    ):
        assert entry in last
    assert last.startswith("cir-jax: import-verl: 3 without a counterpart")
    # The rest is there by force, and the file says what is not.
    code, stdout, _ = run(capsys, script, *lacking, "--tasks", "sum", "--force")
    assert code == 0 and "reward" not in tomllib.loads(stdout)
    assert "# Left out, although it changes the result:" in stdout
    assert "algorithm.filter_groups.enable=True" in stdout


PPO = (
    "algorithm.adv_estimator=gae",
    "algorithm.gamma=0.99",
    "algorithm.lam=0.95",
    "critic.optim.lr=2e-5",
    "critic.optim.lr_warmup_steps_ratio=0.1",
    "critic.optim.betas=[0.9,0.99]",
    "critic.cliprange_value=0.2",
    "critic.grad_clip=0.5",
    "critic.model.path=Qwen/Qwen3-8B",
    "critic.model.enable_gradient_checkpointing=True",
    "critic.ppo_micro_batch_size_per_gpu=4",
    ACTOR + "ppo_epochs=2",
    "critic.ppo_epochs=${actor_rollout_ref.actor.ppo_epochs}",
)


def test_a_critics_keys(tmp_path):
    translation = translated(*PPO)
    assert not translation.lines("lacking", "unknown")
    cfg = written(translation, tmp_path, weights=True)
    rl = cfg.rl
    assert (rl.advantage, rl.gamma, rl.critic.lam, rl.critic.clip) == ("gae", 0.99, 0.95, 0.2)
    assert (rl.epochs, rl.critic.optim.learning_rate, rl.critic.optim.clip_norm) == (2, 2e-5, 0.5)
    # A tenth of 100 steps, of 1024 / 256 updates in each of 2 passes.
    assert (rl.critic.optim.beta2, rl.critic.optim.warmup_steps) == (0.99, 80)
    # Without a critic they are of none.
    without = translated(*PPO[1:])
    assert {entry.key for entry in without.lines("ignored")} >= {
        "algorithm.lam",
        "critic.optim.lr",
        "critic.cliprange_value",
    }


@pytest.mark.parametrize(
    "override",
    [
        "critic.ppo_epochs=1",
        "critic.ppo_mini_batch_size=64",
        "critic.model.path=other",
        "critic.model.lora_rank=8",
        "critic.loss_agg_mode=seq-mean-token-sum",
        "critic.nothing_known=1",
        "trainer.critic_warmup=10",
    ],
)
def test_a_critic_that_is_none_of_ours(override):
    translation = translated(*PPO, override)
    assert [entry.key for entry in translation.lines("lacking")] == [override.partition("=")[0]]


@pytest.mark.parametrize(
    "overrides, category, cap",
    [
        (["algorithm.rollout_is=True", "algorithm.rollout_is_threshold=2"], "approximated", 2.0),
        (
            [
                "algorithm.rollout_is=True",
                "algorithm.rollout_is_threshold=2",
                "algorithm.rollout_is_veto_threshold=null",
            ],
            "translated",
            2.0,
        ),
        (
            [
                "algorithm.rollout_is=True",
                "algorithm.rollout_is_threshold=2",
                "algorithm.rollout_is_level=sequence",
            ],
            "lacking",
            None,
        ),
        # Weights are computed for metrics alone.
        (["algorithm.rollout_is=False", "algorithm.rollout_is_threshold=2"], "honoured", None),
        (["algorithm.rollout_correction.rollout_is=token"], "translated", 2.0),
        (["algorithm.rollout_correction.rollout_is=sequence"], "lacking", None),
    ],
)
def test_correction_between_sampler_and_trainer(overrides, category, cap):
    translation = translated(*overrides)
    assert line(translation, overrides[0].partition("=")[0]).outcome.category == category
    assert translation.settings.get("rl.importance_cap", (None,))[0] == cap


def of_files(*overrides):
    command = shell.Command("main_ppo", (*BASE, *overrides))
    return translate(command, name="run")


def test_a_launchs_files_are_read(tmp_path):
    files = ("data.train_files=['/d/a.parquet','~/b.parquet']", "data.val_files=/d/c.jsonl")
    translation = of_files(*files, "data.prompt_key=messages", "data.reward_fn_key=ability")
    cfg = written(translation, tmp_path, weights=True)
    assert cfg.data.files == ("/d/a.parquet", os.path.expanduser("~/b.parquet"))
    assert (cfg.data.eval_files, cfg.data.tasks) == (("/d/c.jsonl",), ())
    assert (cfg.data.chat, cfg.data.template) == (True, "{question}")
    assert (cfg.data.columns.prompt, cfg.data.columns.source) == ("messages", "ability")
    # veRL's own: an error; ours are left out.
    assert "left out and counted" in line(translation, "data.truncation").outcome.text
    filtered = of_files(*files, "data.filter_overlong_prompts=True")
    assert line(filtered, "data.filter_overlong_prompts").outcome.category == "honoured"
    # Qwen3 thinks unless it is told not to.
    assert "thinking" in line(translation, "data.train_files").outcome.text
    silent = of_files(*files, "+data.apply_chat_template_kwargs.enable_thinking=False")
    assert line(silent, "data.train_files").outcome.category == "translated"
    raw = of_files(*files, ROLLOUT + "generate_method=CIR", ROLLOUT + "max_call_time=2")
    assert setting(raw, "data.chat") is False
    own = of_files()
    assert setting(own, "data.files") == (os.path.expanduser("~/data/rlhf/gsm8k/train.parquet"),)


@pytest.mark.parametrize(
    "override, part",
    [
        ("data.train_files=", "--tasks"),
        ("data.val_files=null", "--tasks"),
        ("data.train_files=a.csv", ".jsonl, .json, .parquet"),
        ("data.train_max_samples=10", "-1"),
        ("data.apply_chat_template_kwargs.enable_thinking=True", "thinking"),
    ],
)
def test_files_that_are_not_read(override, part):
    (found,) = of_files(override).lines("lacking")
    assert str(found).startswith(override) and part in str(found)


def test_a_file_whose_name_is_not_known():
    script = launched(*BASE, "data.train_files=$DATA/train.parquet")
    translation = translate(shell.training_command(script), name="run")
    (found,) = translation.lines("lacking")
    assert found.key == "data.train_files" and "--var" in found.outcome.text


def test_epochs_of_files_are_steps(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "?"}\n' * 100)
    command = shell.Command(
        "main_ppo",
        (
            *BASE[:2],
            f"data.train_files={path}",
            "data.train_batch_size=32",
            "trainer.total_epochs=4",
        ),
    )
    # 100 rows make 3 whole batches of 32.
    assert setting(translate(command, name="run"), "rl.steps") == 12


def test_torl_is_grpo_with_one_update_a_step(tmp_path, capsys):
    script = tmp_path / "torl.sh"
    script.write_text(TORL_SCRIPT)
    code, stdout, report = run(capsys, script, "--tasks", "sum", "--var", "name=x")
    assert "data.train_files=/root/out/x/train.parquet" in report
    tree = tomllib.loads(stdout)
    # One on-policy update a step: the mini-batch is larger than the batch.
    assert (code, tree["rl"]["minibatch_prompts"], tree["rl"]["advantage"]) == (0, 128, "grpo")
    assert (tree["rollout"]["boundary"], tree["rollout"]["max_calls"]) == ("stop_word", 1)
    assert tree["rollout"]["result"] == {"max_chars": 256}
    assert (tree["rollout"]["max_context"], tree["rl"]["clip_high"]) == (3472, 0.2)


def test_overrides_alone(tmp_path, capsys):
    argv = [*BASE, "--tasks", "sum", "--weights", tmp_path]
    code, stdout, _ = run(capsys, *argv)
    assert code == 0
    path = tmp_path / "a.toml"
    path.write_text(stdout)
    assert configs.load(path).rl.steps == 100
    code, other, _ = run(capsys, "--tasks", "sum", "--weights", tmp_path, "--", *BASE)
    assert other == stdout


def test_arguments_and_variables_of_a_script(tmp_path, capsys):
    script = tmp_path / "a.sh"
    script.write_text("N=4\n" + launched(*BASE, ROLLOUT + "n=$N", '"$@"'))
    options = ["--tasks", "sum"]
    for argv, n in (([], 4), (["--var", "N=5"], 5)):
        _, stdout, _ = run(capsys, script, *options, *argv)
        assert tomllib.loads(stdout)["rollout"]["samples_per_prompt"] == n
    _, stdout, _ = run(capsys, *options, script, ROLLOUT + "n=6")
    assert tomllib.loads(stdout)["rollout"]["samples_per_prompt"] == 6


@pytest.mark.parametrize(
    "argv, part",
    [
        (["nowhere.sh"], "nowhere.sh"),
        ([*BASE, "data.train_files="], "data.train_files=: names no file"),
        ([*BASE, "--tasks", "summ"], "summ"),
        ([*BASE, "data.train_files=", "--force"], "data.tasks"),
        ([*BASE, ACTOR[:-1], "--tasks", "sum"], ACTOR[:-1]),
        ([*BASE, ROLLOUT + "top_p=2", "--tasks", "sum"], "rollout.top_p=2.0"),
    ],
)
def test_errors_are_one_line(capsys, argv, part):
    code, stdout, report = run(capsys, *argv)
    assert (code, stdout) == (2, "")
    last = report.splitlines()[-1]
    assert last.startswith("cir-jax: ") and part in last
