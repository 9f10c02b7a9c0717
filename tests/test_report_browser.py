"""The report in a browser: Chromium without a window, from a file, as a reader opens it."""

import json
import re
import shutil

import numpy as np
import pytest
from models_table import TOKENIZER
from runs_on_file import parts_of, trajectory, write_run

from cir_jax.metrics import SAMPLES, MetricsWriter, Outcome
from cir_jax.records import Call, ExecResult, Problem, Score
from cir_jax.report import page
from cir_jax.report.source import gather
from cir_jax.tokenizer import Tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"
)

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "</pre></textarea></style><svg onload=window.hacked=1>",
    "{{ 7 * 7 }}{% raw %} <!-- ]]> &lt;b&gt; \" ' `",
    "right\u202eleft",
)
NUL, HALF = "a\0b", "half \ud83d of a pair"


@pytest.fixture(scope="module")
def chromium():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


class Page:
    """The page, and what a test does with it."""

    def __init__(self, driver, path):
        self.driver, self.path = driver, path

    def open(self, width=1280, height=900):
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        self.driver.get(self.path.as_uri())
        return self.until("return document.documentElement.dataset.readyMs")

    def until(self, script):
        """What the script returns when that is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 15, 0.03).until(lambda d: d.execute_script(script))

    def ask(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def press(self, *keys):
        from selenium.webdriver import ActionChains, Keys

        for key in keys:
            ActionChains(self.driver).send_keys(getattr(Keys, key, key)).perform()

    def choose(self, name, value):
        """Of a select or a field, as a person does."""
        self.ask(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}));"
            "e.dispatchEvent(new Event('change', {bubbles: true}));",
            name,
            value,
        )

    def count(self):
        return int(re.match(r"\d+|none", self.text("#count"))[0].replace("none", "0"))

    def text(self, selector):
        return self.ask("return document.querySelector(arguments[0])?.textContent", selector)

    def focused(self):
        return self.ask("return document.activeElement.id")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two runs on the same problems, with trajectories that want to break the page."""
    folder = tmp_path_factory.mktemp("report")
    tokenizer = Tokenizer(TOKENIZER)
    first = write_run(folder / "first", tokenizer)
    second = write_run(folder / "second", tokenizer, f"name={json.dumps(HOSTILE[0])}")
    writer = MetricsWriter(first)
    for n, text in enumerate(HOSTILE):
        problem = Problem(f"{text}/rl/{n}", text, f"hostile {n} {text}", text, "math")
        call = Call(text, ExecResult("ok", text * 5), 3)
        t = trajectory(tokenizer, problem, n, parts_of(text, text, text, text), (call,))
        outcome = Outcome(4, 9, 2, -1.0, np.zeros(len(t.ids), np.float32))
        writer.write_sample(t, Score(-1.0, text), outcome, tokenizer.decode(t.ids))
    # What no tokenizer writes, but a program's output or a file of problems may hold.
    line = json.loads((first / SAMPLES).read_text().splitlines()[-1])
    line |= {"question": f"hostile {NUL} {HALF}", "reason": HALF}
    line["calls"][0] |= {"stdout": f"{NUL} {HALF} {HOSTILE[0]}"}
    with open(first / SAMPLES, "a", encoding="ascii") as file:
        file.write(json.dumps(line) + "\n")
    html, notes = page.render(gather([first, second]), most=2000)
    assert notes == []
    path = folder / "report.html"
    path.write_bytes(html.encode("utf-8", "replace"))
    return path


@pytest.fixture
def opened(chromium, written):
    shown = Page(chromium, written)
    shown.open()
    yield shown
    problems = [e for e in chromium.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
    assert problems == []
    assert shown.ask("return window.hacked") is None


def test_filters_and_search(opened):
    total = opened.count()
    assert total == 2 * 24 + len(HOSTILE) + 1
    counts = {}
    for name, value in (
        ("by-run", "1"),
        ("by-task", "0"),
        ("by-score", "correct"),
        ("by-code", "failed"),
        ("by-code", "none"),
        ("by-end", "budget"),
        ("from-step", "4"),
    ):
        opened.choose(name, value)
        counts[name, value] = opened.count()
        opened.ask("document.getElementById('clear').click()")
        assert opened.count() == total
    assert counts["by-run", "1"] == 24
    assert counts["by-task", "0"] == 2 * 8
    assert counts["by-score", "correct"] == 2 * 12
    # By runs_on_file: n = 100 step + 10 group + sample; no program if 3 divides n, else one, which
    # fails if 4 does.
    numbers = [100 * s + 10 * g + i for s in range(1, 5) for g in range(3) for i in range(2)]
    with_code = [n for n in numbers if n % 3]
    assert counts["by-code", "none"] == 2 * (24 - len(with_code))
    assert counts["by-code", "failed"] == 2 * sum(n % 4 == 0 for n in with_code)
    assert counts["by-end", "budget"] == 2 * sum(n < 300 for n in with_code)
    assert counts["from-step", "4"] == 2 * 6 + len(HOSTILE) + 1
    opened.choose("search", "ZERODIVISION division")
    opened.until(f"return !document.getElementById('count').textContent.startsWith('{total} ')")
    assert opened.count() == counts["by-code", "failed"]
    opened.choose("search", "no such words")
    opened.until("return document.getElementById('count').textContent.startsWith('none')")


def test_the_keyboard_reaches_everything(opened):
    opened.press("/")
    assert opened.focused() == "search"
    opened.press("ENTER")
    assert opened.focused() == "list"
    before = opened.ask(
        "return document.getElementById('list').getAttribute('aria-activedescendant')"
    )
    opened.press("ARROW_DOWN", "ARROW_DOWN", "ARROW_UP", "ARROW_DOWN")
    after = opened.ask(
        "return document.getElementById('list').getAttribute('aria-activedescendant')"
    )
    assert before != after
    number = after.removeprefix("row-")
    opened.until(f"return document.getElementById('detail').dataset.shown === '{number}'")
    style = "return getComputedStyle(document.activeElement).outlineStyle"
    assert opened.ask(style) != "none"
    opened.press("ENTER")
    assert opened.focused() == "detail"
    opened.press("TAB", "TAB", "TAB")
    assert opened.ask("return document.activeElement.className") == "text"
    opened.press("ARROW_RIGHT", "ARROW_RIGHT")
    assert "by the model" in opened.text("#tip")
    assert opened.text("#spoken") == opened.text("#tip")
    opened.press("ESCAPE")
    assert opened.focused() == "list"


def test_two_runs_side_by_side_on_a_problem(opened):
    opened.ask("document.getElementById('shared').click()")
    assert opened.count() == 48
    opened.press("/", "ENTER", "HOME")
    options = opened.ask(
        "return [...document.querySelectorAll('#beside optgroup')].map((g) => g.label)"
    )
    # The other run's first.
    assert len(options) == 2 and options[0].endswith("second") and options[1].endswith("first")
    value = opened.ask("return document.querySelector('#beside optgroup option').value")
    opened.choose("beside", value)
    opened.until("return document.querySelectorAll('#detail .trajectory').length === 2")
    titles = opened.ask(
        "return [...document.querySelectorAll('.trajectory h3')].map((h) => h.textContent)"
    )
    assert "first, step 1" in titles[0] and "second, step 1" in titles[1]
    problems = opened.ask(
        "return [...document.querySelectorAll('.chips div')].map((d) => d.textContent)"
        ".filter((t) => t.startsWith('problem'))"
    )
    assert len(problems) == 2 and problems[0] == problems[1]
    # The next problem is compared as well.
    opened.press("/", "ENTER", "END")
    opened.until("return document.querySelectorAll('#detail .trajectory').length === 2")


def test_tokens_are_shown_as_they_were_sampled(opened):
    opened.choose("by-code", "some")
    opened.press("/", "ENTER", "HOME")
    opened.until("return document.querySelector('#detail .tool')")
    texts = opened.ask(
        "return [...document.querySelectorAll('#detail .text > *')]"
        ".map((b) => [b.className, b.textContent])"
    )
    assert [name for name, _ in texts] == [
        "block prompt",
        "prose",
        "block code",
        "block tool",
        "prose",
    ]
    assert "```python\nprint(" in texts[2][1] and texts[2][1].startswith("program 1")
    assert texts[3][1].startswith("output of program 1```output")
    opened.ask(
        "const t = document.querySelectorAll('#detail .a1')[2];"
        "t.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
    )
    # The third of the model's tokens, as runs_on_file makes log-probabilities.
    tip = opened.text("#tip")
    position = int(re.search(r"token (\d+) of", tip)[1]) - 1
    assert f"log-probability \u2212{position / 20:g}," in tip
    opened.ask(
        "const t = document.querySelector('#detail .a2');"
        "t.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
    )
    assert "by the tool\nnot sampled" in opened.text("#tip")
    chips = opened.text("#detail .chips")
    assert "advantage" in chips and "reward" in chips and "budget used up" in chips


def test_hostile_text_is_text(opened):
    opened.choose("search", "hostile")
    count = len(HOSTILE) + 1
    opened.until(f"return document.getElementById('count').textContent.startsWith('{count} ')")
    opened.press("/", "ENTER")
    for n in range(count):
        opened.press("HOME", *["ARROW_DOWN"] * n)
        opened.until(
            "const row = document.querySelector('#list [aria-selected=true]');"
            "return row && document.getElementById('detail').dataset.shown === row.id.slice(4)"
        )
        shown = opened.text("#detail")
        if n < len(HOSTILE):
            assert HOSTILE[n].replace("\u202e", "\ufffd") in shown
        else:
            assert "a\u2400b" in shown and "half \ufffd of" in shown
        opened.ask(
            "document.querySelectorAll('#detail details').forEach((d) => { d.open = true; })"
        )
    made = "return document.querySelectorAll('main img, main [onload], main [onerror]').length"
    assert opened.ask(made) == 0
    assert "\u202e" not in opened.text("#trajectories")


def test_values_of_a_figure_are_read_by_keyboard(opened):
    opened.ask("document.querySelector('figure').focus()")
    opened.press("HOME", "ARROW_RIGHT")
    assert re.fullmatch(r"step 2 · \S*first 0\.2 · \S*second 0\.2", opened.text("figure .readout"))
    assert opened.ask("return document.querySelectorAll('figure .cursor').length") == 1


def test_a_telephone_shows_it_without_sideways_scrolling(opened):
    opened.open(375, 812)
    assert opened.ask("return document.documentElement.scrollWidth") == 375
    opened.ask("document.querySelector('#list li').click()")
    opened.until("return document.querySelector('#detail .trajectory')")
    assert opened.focused() == "detail"
    assert opened.ask("return document.documentElement.scrollWidth") == 375
    top = "return Math.abs(document.getElementById('detail').getBoundingClientRect().top)"
    assert opened.ask(top) < 120
    opened.ask("document.querySelector('.only-narrow').click()")
    assert opened.focused() == "list"


def test_nothing_is_asked_for_elsewhere(opened):
    names = "return performance.getEntriesByType('resource').map((e) => e.name)"
    assert opened.ask(names) == []
    # Text that became HTML all the same could run nothing.
    opened.ask(
        "document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=window.hacked=1>')"
    )
    opened.until("return document.querySelector('body > img').complete")
    assert opened.ask("return window.hacked") is None
    refused = opened.driver.get_log("browser")
    assert any("Content Security Policy" in entry["message"] for entry in refused)
