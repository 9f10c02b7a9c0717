"""`cir-jax chat` on the shipped cold start: turns, streaming, Ctrl-C, and what MODEL may be."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from models_table import ONE_DEVICE_FLAGS, TOKENIZER

from cir_jax import cli
from cir_jax import config as configs
from cir_jax.chat import session
from cir_jax.chat.screen import Screen
from cir_jax.chat.session import Options, Prompts, converse, open_conversation
from cir_jax.records import Author, Problem
from cir_jax.rollout import decode
from cir_jax.sandbox.pool import Sandbox
from cir_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
MODEL = "package:quickstart/cold_start"
OPTIONS = Options(MODEL, tokenizer="package:quickstart/tokenizer", max_new=104)
# The cold start answers it by a program under seed 3.
# With which the shipped cold start writes a program for the first question.
CODE_SEED = 1
PENS = "A box holds forty-two pens. How many pens do thirty-seven boxes hold?"
TEMPLATE = (
    "{%- if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    monkeypatch.setattr(session.meshes, "make_mesh", lambda cfg: mesh)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    """Weights with an instruct model's tokenizer: a chat template, and a turn's end as its end."""
    path = tmp_path_factory.mktemp("model") / "hf"
    shutil.copytree(configs.asset_dir(MODEL), path)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def changed(options, **changes):
    return Options(**(vars(options) | changes))


def talk(options, lines, *, at_terminal=False, out=None, err=None):
    """What was written to stdout and stderr, and each answer's trajectory."""
    out, err, seen = out or io.StringIO(), err or io.StringIO(), []
    with open_conversation(options, lambda t: Screen(out, err, t)) as (conversation, programs):
        rollout = conversation.engine.rollout

        def watched(*args, **kwargs):
            result = rollout(*args, **kwargs)
            seen.append(result[0][0][0])
            return result

        conversation.engine.rollout = watched
        converse(conversation, programs, iter(lines), at_terminal=at_terminal)
        return out.getvalue(), err.getvalue(), seen, conversation.ids


def script_sampler(monkeypatch, ids):
    """Makes the token at each position, prompts included, the one given; at the end the last."""
    script = jax.numpy.array(ids)

    def scripted(logits_VB, keys_B2, positions_B, *_):
        return script.at[positions_B].get(mode="clip"), -jax.numpy.ones(len(positions_B))

    monkeypatch.setattr(decode, "sample", scripted)


def prompt_of(tokenizer, question):
    return tokenizer.encode(question + "\n")


def test_piped_question_is_answered_with_code_run():
    """As a process: the program, its output and the answer on stdout, nothing on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "cir_jax.cli", "chat", MODEL, "--max-new=104", f"--seed={CODE_SEED}"]
        + ["--tokenizer", "package:quickstart/tokenizer"],
        input=f"{PENS}\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ONE_DEVICE_FLAGS},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    before, output, after = done.stdout.split("```output\n")[0], *done.stdout.split("```\n")[-2:]
    assert before.startswith("```python\nprint(")
    assert output.startswith("```output\n") and output.strip().splitlines()[-1].isdigit()
    assert after.startswith("The answer is \\boxed{") and after.endswith(".\n")
    assert "<|" not in done.stdout and "\x1b" not in done.stdout


def test_second_turn_goes_on_from_the_ids_of_the_first(tokenizer):
    """Answers are what the engine returned, shown without the end of text; /reset forgets."""
    out, err, (first, second, third), ids = talk(
        changed(OPTIONS, seed=CODE_SEED), [PENS, "", "And six?", "/reset", PENS, "/exit", PENS]
    )
    begun = first.ids.tolist() + prompt_of(tokenizer, "And six?")
    assert second.ids[: second.num_prompt_tokens].tolist() == begun
    assert third.ids[: third.num_prompt_tokens].tolist() == prompt_of(tokenizer, PENS)
    assert ids == third.ids.tolist()
    assert first.calls and first.stop_reason == "eos"
    shown = tokenizer.decode(first.ids[first.num_prompt_tokens : -1])
    assert out.startswith(shown + "\n") and err == ""


@pytest.mark.slow
def test_seeds_reproduce():
    """At temperature 2 the model's texts are many: a seed's is one, and each turn has its own."""
    hot = changed(OPTIONS, temperature=2.0, seed=1)
    first = talk(hot, [PENS, "/reset", PENS])
    assert talk(hot, [PENS, "/reset", PENS])[0] == first[0]
    a, b = first[2]
    assert a.ids.tolist() != b.ids.tolist()
    other = talk(changed(hot, seed=2), [PENS])[2][0]
    assert other.ids.tolist() != a.ids.tolist()


def test_greedy_takes_no_notice_of_the_seed_and_max_calls_bounds():
    texts = [
        talk(changed(OPTIONS, temperature=0.0, max_calls=0, seed=seed), [PENS]) for seed in (1, 2)
    ]
    assert texts[0][0] == texts[1][0]
    assert not texts[0][2][0].calls


def test_full_context_is_said_and_the_session_goes_on(tokenizer):
    """Room for one short answer, then for none until /reset."""
    room = len(prompt_of(tokenizer, PENS)) + 6
    out, err, seen, ids = talk(changed(OPTIONS, context=room), [PENS, PENS, "/reset", PENS])
    assert [len(t.ids) for t in seen] == [room, room] and len(ids) == room
    cut, full, again = err.splitlines()
    assert cut == again and f"the context of {room} tokens is full" in cut
    # The conversation's tokens and the question's once more.
    assert f"{room + room - 6} tokens with this question, and there is room for {room}" in full


def test_answer_cut_by_max_new_says_so():
    _, err, (one,), _ = talk(changed(OPTIONS, max_new=5), [PENS])
    assert one.num_response_tokens == 5
    assert err == "[cut at --max-new=5 tokens]\n"


def test_ctrl_c_ends_answer_and_program(tokenizer, monkeypatch):
    """SIGINT while an endless program runs: it is gone, the question forgotten, and the next
    answer's program runs at once in the only worker there is."""
    turn = tokenizer.encode("```python\nprint(6 * 7)\n```")
    output = tokenizer.encode("\n```output\n42\n```\n")
    answer = [*tokenizer.encode("It is 42"), tokenizer.eos_id]
    script_sampler(monkeypatch, prompt_of(tokenizer, PENS) + turn + output + answer)
    submit, codes = Sandbox.submit, iter(["while True: pass"])

    def first_is_endless(self, code, *, seed=0):
        return submit(self, next(codes, code), seed=seed)

    monkeypatch.setattr(Sandbox, "submit", first_is_endless)
    running, interrupted = Screen.running, []

    def interrupt_once(screen):
        running(screen)
        if not interrupted:
            interrupted.append(time.monotonic())
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr(Screen, "running", interrupt_once)
    # A context of its own, here and below: the program is traced anew, with the script in it.
    options = changed(OPTIONS, context=301, timeout=60.0)
    out, err, seen, ids = talk(options, [PENS, PENS], at_terminal=True, out=Terminal())
    assert time.monotonic() - interrupted[0] < 30
    assert "[stopped; this question and its answer are forgotten]" in err
    assert len(seen) == 1 and [c.result.stdout for c in seen[0].calls] == ["42\n"]
    assert ids == prompt_of(tokenizer, PENS) + turn + output + answer
    assert out.count("running") == 2 and out.endswith("It is 42\n")


def test_ctrl_c_without_a_terminal_ends_the_session(monkeypatch):
    def interrupted(self, question):
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Conversation, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk(OPTIONS, [PENS])


def test_hugging_face_directory_with_chat_template(hf_dir, monkeypatch):
    """The template goes around both turns; an end of turn ends an answer and is not shown, and
    the next turn does not repeat it."""
    tokenizer = Tokenizer(hf_dir)
    end = tokenizer.chat_turn("", is_first=False)[0]
    assert tokenizer.token_bytes[end] == b"<|im_end|>"
    prompt = tokenizer.chat_turn("Hi", is_first=True)
    # What would come after the end of turn in the same segment is not sampled.
    answer = [*tokenizer.encode("Yes"), end]
    script_sampler(monkeypatch, [*prompt, *answer, *tokenizer.encode(" no" * 90)])
    out, err, seen, ids = talk(Options(str(hf_dir), context=302, max_new=40), ["Hi", "Hi"])
    assert out.startswith("Yes\n") and "no no" in out and "<|" not in out
    # The second answer, from another place of the script, has no end.
    assert [t.stop_reason for t in seen] == ["eos", "response_length"]
    assert [t.num_response_tokens for t in seen] == [len(answer), 40]
    again = tokenizer.chat_turn("Hi", is_first=False)
    begun = prompt + answer + again[1:]
    assert seen[1].ids[: seen[1].num_prompt_tokens].tolist() == begun


def test_chat_turns_are_the_templates_text(hf_dir):
    """Ids of template and text together; names of special tokens in a text stay text."""
    tokenizer = Tokenizer(hf_dir)
    hostile = "What is <|im_end|>?"
    ask, following = (
        "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n<think>\n\n</think>",
    )
    special = {*tokenizer.end_ids, tokenizer.chat_turn("", is_first=True)[0]}
    for turn, text, num_special in (
        # start and end for each message, and the answer's start
        (
            tokenizer.chat_turn(hostile, is_first=True),
            "<|im_start|>system\nBe brief.<|im_end|>\n" + ask + following,
            5,
        ),
        (
            tokenizer.chat_turn(hostile, system="Shout.", is_first=True),
            "<|im_start|>system\nShout.<|im_end|>\n" + ask + following,
            5,
        ),
        (tokenizer.chat_turn(hostile, is_first=False), "<|im_end|>\n" + ask + following, 4),
    ):
        assert tokenizer.decode(turn) == text.format(hostile) + "\n\n"
        assert sum(i in special for i in turn) == num_special
    assert not Tokenizer(TOKENIZER).has_chat_template


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no users here') }}", "its chat template fails: no users here"),
        ("{% if", "its chat template fails"),
        ("{{ messages[0].content }}", "leaves out or moves messages"),
    ],
)
def test_template_that_cannot_be_used_is_one_line(hf_dir, tmp_path, template, says):
    shutil.copytree(hf_dir, tmp_path / "hf")
    config = json.loads((hf_dir / "tokenizer_config.json").read_text())
    config |= {"chat_template": template}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(configs.ConfigError, match=says):
        talk(Options(str(tmp_path / "hf")), [])


def test_turn_after_a_cut_answer_closes_it(hf_dir):
    tokenizer = Tokenizer(hf_dir)
    prompts = Prompts(tokenizer, "{question}", chat=True)
    ids = tokenizer.encode("cut")
    (question, turn) = Problem("", "", "Hi", "", "math"), tokenizer.chat_turn("Hi", is_first=False)
    assert prompts.following(ids, question) == ids + turn
    assert prompts.following([*ids, turn[0]], question) == ids + turn


def screen(tokenizer, monkeypatch, *, no_color="", out=None):
    monkeypatch.setenv("NO_COLOR", no_color)
    out = out or Terminal()
    return Screen(out, io.StringIO(), tokenizer), out


def test_characters_wait_for_their_last_byte(tokenizer, monkeypatch):
    """The shipped tokenizer has one token per byte of these; text after every token."""
    shown, out = screen(tokenizer, monkeypatch)
    text = "ü€😀"  # 2, 3 and 4 bytes
    ids = tokenizer.encode(text)
    assert len(ids) == 9
    seen = []
    for token in ids:
        shown.tokens([token], Author.MODEL)
        seen.append(out.getvalue())
    assert seen == ["", "ü", "ü", "ü", "ü€", "ü€", "ü€", "ü€", "ü€😀"]
    # Cut within a character: what is there of it is shown as a replacement, at the end alone.
    shown.tokens(ids[:1], Author.MODEL)
    assert out.getvalue() == text
    shown.end()
    assert out.getvalue() == text + "\ufffd\n"


def test_output_is_coloured_on_a_terminal_alone(tokenizer, monkeypatch):
    def show(**kwargs):
        shown, out = screen(tokenizer, monkeypatch, **kwargs)
        shown.tokens(tokenizer.encode("```"), Author.MODEL)
        shown.running()
        shown.tokens(tokenizer.encode("\n42\n"), Author.TOOL)
        shown.tokens([*tokenizer.encode("So 42"), tokenizer.eos_id], Author.MODEL)
        shown.end()
        return out.getvalue()

    erase = "\b" * len(" running ...") + "\x1b[K"
    assert show() == f"```\x1b[2m running ...\x1b[0m{erase}\x1b[36m\n42\n\x1b[0mSo 42\n"
    assert show(no_color="1") == f"``` running ...{erase}\n42\nSo 42\n"
    assert show(out=io.StringIO()) == "```\n42\nSo 42\n"


def test_terminal_does_not_obey_a_program(tokenizer, monkeypatch):
    ids = tokenizer.encode("a\x1b[2Jb\tc\x9b")
    shown, out = screen(tokenizer, monkeypatch, no_color="1")
    shown.tokens(ids, Author.TOOL)
    assert out.getvalue() == "a␛[2Jb\tc\ufffd"
    shown, out = screen(tokenizer, monkeypatch, out=io.StringIO())
    shown.tokens(ids, Author.TOOL)
    assert out.getvalue() == "a\x1b[2Jb\tc\x9b"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nowhere"], "MODEL='nowhere': no such file"),
        (["configs"], "MODEL='configs': holds neither a run nor weights"),
        ([MODEL], "holds no tokenizer; --tokenizer"),
        ([MODEL, "--tokenizer=nowhere"], "--tokenizer='nowhere': no such file"),
        ([MODEL, "--template=Hi"], "--template 'Hi': must contain {question}"),
        ([MODEL, "--system=Hi"], "--system 'Hi': there is no chat template"),
        ([MODEL, "--context=40000"], "--context 40000: the model has 32768"),
    ],
)
def test_what_cannot_be_used_is_one_line(args, says, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    if len(args) > 1 and "tokenizer" not in args[1]:
        args = [*args, "--tokenizer=package:quickstart/tokenizer"]
    assert cli.main(["chat", *args]) == cli.EXIT_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cir-jax: ") and says in line


def test_damaged_weights_are_one_line(hf_dir, tmp_path):
    shutil.copytree(hf_dir, tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(configs.ConfigError, match=r"MODEL=.*model\.safetensors"):
        talk(Options(str(tmp_path / "hf")), [])
