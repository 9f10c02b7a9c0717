"use strict";
// Everything that models and programs wrote comes in as compressed JSON and goes into the page by
// textContent alone.

const $ = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// As signs: characters that would not be seen, that would reorder what stands around them, and
// halves of a pair.
function visible(text) {
  return text
    .replace(/[\0-\x08\x0b-\x1f\x7f]/g, (c) => (c === "\x7f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0))))
    .replace(/[\u202a-\u202e\u2066-\u2069]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd");
}

async function unpack(script) {
  const bytes = Uint8Array.from(atob(script.textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return null;
  const text = Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(Number(value.toFixed(digits)));
  return text.replace("-", "\u2212");
}

function show(id, isShown) {
  $(id).hidden = !isShown;
}

// --- figures: values read off

function watchCharts(charts, runs) {
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const { box, steps, curves } = charts[figure.dataset.chart];
    const plot = figure.querySelector("svg");
    const readout = figure.querySelector(".readout");
    const all = [...new Set(curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
    const place = (step) => box[0] + ((step - steps[0]) / (steps[1] - steps[0])) * (box[2] - box[0]);
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    line.setAttribute("class", "cursor");
    let at = null;

    const read = (index) => {
      at = index;
      if (index === null) {
        line.remove();
        readout.replaceChildren();
        return;
      }
      const step = all[index];
      for (const [name, value] of [["x1", place(step)], ["x2", place(step)], ["y1", box[1]], ["y2", box[3]]]) line.setAttribute(name, value);
      plot.append(line);
      const parts = [`step ${step}`];
      for (const curve of curves) {
        const n = curve.x.indexOf(step);
        if (n < 0) continue;
        const names = [runs.length > 1 ? runs[curve.run] : "", new Set(curves.map((c) => c.name)).size > 1 ? curve.name : ""];
        parts.push([names.filter(Boolean).join(", "), number(curve.y[n])]);
      }
      readout.replaceChildren(parts[0]);
      for (const [name, value] of parts.slice(1)) readout.append(" · ", name ? `${name} ` : "", element("b", {}, value));
    };
    const nearest = (event) => {
      const shown = plot.getBoundingClientRect();
      const x = ((event.clientX - shown.left) / shown.width) * plot.viewBox.baseVal.width;
      let best = 0;
      all.forEach((step, n) => {
        if (Math.abs(place(step) - x) < Math.abs(place(all[best]) - x)) best = n;
      });
      read(best);
    };
    plot.addEventListener("pointermove", nearest);
    plot.addEventListener("pointerdown", nearest);
    plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && read(null));
    figure.addEventListener("blur", () => read(null));
    figure.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowRight: 1 };
      if (event.key in moves) read(at === null ? all.length - 1 : Math.min(all.length - 1, Math.max(0, at + moves[event.key])));
      else if (event.key === "Home") read(0);
      else if (event.key === "End") read(all.length - 1);
      else if (event.key === "Escape") read(null);
      else return;
      event.preventDefault();
    });
  }
}

// --- the text of a trajectory

const CHANCE = [0.9, 0.5, 0.2, 0.05];
const AUTHORS = ["prompt", "model", "tool"];

function shadeOf(chance) {
  return CHANCE.filter((bound) => chance < bound).length;
}

// Tokens with what is known of each.
function tokensOf(whole) {
  const tokens = [];
  let at = 0, position = 0, sampled = 0;
  for (const [author, count] of whole.spans) {
    for (let n = 0; n < count; n += 1, position += 1) {
      const size = whole.sizes[position];
      const token = { author, position, start: at, end: at + size };
      const logp = author === 1 ? whole.logp[sampled++] : null;
      if (logp !== null) token.logp = -logp / 1000;
      if (whole.advantages) token.advantage = whole.advantages[position];
      at += size;
      tokens.push(token);
    }
  }
  return tokens;
}

// Stretches of one author: [author, start, end] in the text.
function stretchesOf(whole, tokens) {
  const found = [];
  let n = 0;
  for (const [author, count] of whole.spans) {
    found.push([author, tokens[n].start, tokens[n + count - 1].end]);
    n += count;
  }
  return found;
}

// A stretch of the text as elements, one for each token or part of one.
function spanned(view, start, end) {
  const { whole, tokens } = view;
  const made = [];
  let n = view.next;
  while (n < tokens.length && tokens[n].end <= start && tokens[n].start < start) n += 1;
  for (; n < tokens.length && tokens[n].start < end; n += 1) {
    const token = tokens[n];
    const text = whole.text.slice(Math.max(start, token.start), Math.min(end, token.end));
    if (!text) continue;
    const shade = token.logp === undefined ? 0 : shadeOf(Math.exp(token.logp));
    made.push(element("span", { class: `t a${token.author}${shade ? ` u${shade}` : ""}`, "data-n": n }, visible(text)));
    if (token.end > end) break;
  }
  view.next = n;
  return made;
}

const STATUS = { ok: "ran", error: "failed", timeout: "ran out of time", crashed: "crashed", oom: "ran out of memory" };

function callTitle(call, n) {
  const status = STATUS[call[1]] ?? call[1];
  return element("header", {}, element("span", {}, `program ${n + 1}`), element("span", { class: call[1] === "ok" ? "good" : "bad" }, status));
}

// Without the line ends around it: blocks stand apart as it is.
function trimmed(text, start, end) {
  while (start < end && text[start] === "\n") start += 1;
  while (end > start && text[end - 1] === "\n") end -= 1;
  return [start, end];
}

// What the model wrote between two outputs: prose, and programs apart.
function modelBlocks(view, start, end, isCall, state) {
  const text = view.whole.text.slice(start, end);
  const blocks = [...text.matchAll(/```python[^\S\n]*\n[\s\S]*?(?:```|$)/g)];
  const made = [];
  let at = start;
  const prose = (until) => {
    const [from, to] = trimmed(view.whole.text, at, until);
    if (from < to) made.push(element("div", { class: "prose" }, ...spanned(view, from, to)));
    at = until;
  };
  blocks.forEach((block, n) => {
    prose(start + block.index);
    const stop = start + block.index + block[0].length;
    const call = isCall && n === blocks.length - 1 ? view.whole.calls[state.call] : null;
    const header = call ? callTitle(call, state.call) : element("header", {}, "program, not run");
    made.push(element("div", { class: "block code" }, header, ...spanned(view, at, stop)));
    at = stop;
  });
  prose(end);
  return made;
}

function toolBlock(view, start, end, state) {
  const call = view.whole.calls[state.call];
  const [from, to] = trimmed(view.whole.text, start, end);
  const block = element("div", { class: "block tool" }, element("header", {}, `output of program ${state.call + 1}`), ...spanned(view, from, to));
  const put = view.whole.text.slice(start, end);
  for (const [name, text] of call ? [["printed", call[2]], ["error", call[3]]] : []) {
    if (text.trim() && !put.includes(text.trim())) {
      block.append(element("details", {}, element("summary", {}, `all of what it ${name === "error" ? "ended with" : "printed"}, ${text.length} characters`), element("pre", {}, visible(text))));
    }
  }
  state.call += 1;
  return block;
}

// Without a tokenizer: the text as it is on record, then programs and outputs.
function blocksWithoutTokens(whole) {
  return [element("div", { class: "prose" }, visible(whole.text))].concat(whole.calls.flatMap((call, n) => [
    element("div", { class: "block code" }, callTitle(call, n), visible(call[0])),
    element("div", { class: "block tool" }, element("header", {}, `output of program ${n + 1}`), visible(call[2] || call[3])),
  ]));
}

function blocksOf(view) {
  const { whole, tokens } = view;
  const stretches = stretchesOf(whole, tokens);
  const state = { call: 0 };
  const blocks = [];
  stretches.forEach(([author, start, end], n) => {
    if (author === 0) {
      const prompt = element("details", {}, element("summary", {}, `prompt, ${whole.spans[n][1]} tokens`), ...spanned(view, start, end));
      blocks.push(element("div", { class: "block prompt" }, prompt));
    } else if (author === 2) {
      blocks.push(toolBlock(view, start, end, state));
    } else {
      const isLast = n === stretches.length - 1;
      const isCall = isLast ? state.call < whole.calls.length : stretches[n + 1][0] === 2;
      blocks.push(...modelBlocks(view, start, end, isCall, state));
    }
  });
  return blocks;
}

function textOf(view) {
  const blocks = view.tokens.length ? blocksOf(view) : blocksWithoutTokens(view.whole);
  return element("div", { class: "text", tabindex: "0", role: "group", "aria-label": "Text of the trajectory; arrow keys go from token to token" }, ...blocks);
}

// --- tokens under the pointer

const tip = {
  view: null,
  marked: [],
  hide() {
    for (const span of this.marked) span.classList.remove("at");
    this.marked = [];
    show("tip", false);
  },
  describe(view, n) {
    const token = view.tokens[n];
    const text = view.whole.text.slice(token.start, token.end);
    const lines = [`${JSON.stringify(visible(text))}, token ${token.position + 1} of ${view.tokens.length}, by the ${AUTHORS[token.author]}`];
    if (token.logp !== undefined) lines.push(`log-probability ${number(token.logp)}, probability ${number(Math.exp(token.logp))}`);
    else if (token.author === 2) lines.push("not sampled, not trained on");
    if (token.advantage !== undefined && token.author === 1) lines.push(`advantage ${number(token.advantage)}`);
    return lines.join("\n");
  },
  at(view, box, n) {
    this.hide();
    this.marked = [...box.querySelectorAll(`[data-n="${n}"]`)];
    if (!this.marked.length) return null;
    for (const span of this.marked) span.classList.add("at");
    const text = this.describe(view, n);
    const node = $("tip");
    node.textContent = text;
    show("tip", true);
    const where = this.marked[0].getClientRects()[0] ?? this.marked[0].getBoundingClientRect();
    const above = where.top - node.offsetHeight - 6;
    node.style.left = `${Math.max(6, Math.min(where.left, innerWidth - node.offsetWidth - 6))}px`;
    node.style.top = `${above > 50 ? above : where.bottom + 6}px`;
    return text;
  },
};

function watchTokens(box, view) {
  let at = -1;
  const numberAt = (event) => event.target.closest?.("[data-n]")?.dataset.n;
  const point = (event) => {
    const n = numberAt(event);
    if (n === undefined) tip.hide();
    else tip.at(view, box, Number(n));
  };
  box.addEventListener("pointerover", point);
  box.addEventListener("pointerdown", (event) => {
    point(event);
    const n = numberAt(event);
    if (n !== undefined) at = Number(n);
  });
  box.addEventListener("pointerleave", () => tip.hide());
  box.addEventListener("blur", () => tip.hide());
  const go = (from, step) => {
    for (let n = from; n >= 0 && n < view.tokens.length; n += step) {
      const span = box.querySelector(`[data-n="${n}"]`);
      if (span && !span.closest("details:not([open])")) {
        at = n;
        span.scrollIntoView({ block: "nearest" });
        $("spoken").textContent = tip.at(view, box, n) ?? "";
        return;
      }
    }
  };
  box.addEventListener("keydown", (event) => {
    if (event.target !== box) return;
    if (event.key === "ArrowRight") go(at + 1, 1);
    else if (event.key === "ArrowLeft") go(at < 0 ? view.tokens.length - 1 : at - 1, -1);
    else if (event.key === "Home") go(0, 1);
    else if (event.key === "End") go(view.tokens.length - 1, -1);
    else return;
    event.preventDefault();
  });
}

// --- list, filters, detail

function browse(index, chunks) {
  const { table, runs, chunk } = index;
  const { names } = table;
  const count = table.run.length;
  const unpacked = new Map();
  const wholeOf = async (i) => {
    const n = Math.floor(i / chunk);
    if (!unpacked.has(n)) unpacked.set(n, unpack(chunks[n]));
    return (await unpacked.get(n))[i % chunk];
  };
  const taskOf = (i) => names.task[table.task[i]];
  const problemOf = (i) => names.problem[table.problem[i]];
  const correct = (i) => table.score[i] > 0;

  const ofProblem = new Map();
  for (let i = 0; i < count; i += 1) {
    const key = table.problem[i];
    if (!ofProblem.has(key)) ofProblem.set(key, []);
    ofProblem.get(key).push(i);
  }
  const isShared = new Set([...ofProblem].filter(([, own]) => new Set(own.map((i) => table.run[i])).size > 1).map(([key]) => key));

  const fill = (id, values) => $(id).append(...values.map(([value, text]) => element("option", { value }, visible(text))));
  fill("by-run", runs.map((name, n) => [n, name]));
  fill("by-task", names.task.map((name, n) => [n, name]).sort((a, b) => a[1].localeCompare(b[1])));
  const hide = (id) => $(id).closest("label").style.setProperty("display", "none");
  if (runs.length < 2) hide("by-run");
  if (!isShared.size) hide("shared");
  if (table.step.every((step) => step === null)) ["from-step", "to-step"].forEach(hide);

  // The words of a search, looked for in whatever a trajectory holds; texts are unpacked for the first.
  let texts = null;
  const searchable = async () => {
    if (texts) return texts;
    const found = [];
    for (let i = 0; i < count; i += 1) {
      const whole = await wholeOf(i);
      const parts = [whole.question, whole.text, whole.truth, whole.answer ?? "", problemOf(i), taskOf(i), names.reason[table.reason[i]], ...whole.calls.flat()];
      found.push(parts.join("\n").toLowerCase());
    }
    texts = found;
    return texts;
  };

  const CODE = {
    none: (i) => table.calls[i] === 0,
    some: (i) => table.calls[i] > 0,
    failed: (i) => table.failed[i] > 0,
    several: (i) => table.calls[i] > 1,
  };
  const usedUp = (i) => table.budget[i] > 0 && table.calls[i] >= table.budget[i];
  const END = { budget: usedUp, cut: (i) => names.stop[table.stop[i]] !== "eos" };
  const byLargest = (column) => (a, b) => (table[column][b] ?? -Infinity) - (table[column][a] ?? -Infinity) || a - b;
  const ORDER = { latest: byLargest("step"), reward: byLargest("reward"), advantage: byLargest("advantage"), length: byLargest("tokens") };

  let shown = [];
  let active = -1;
  let asked = 0;

  const filter = async () => {
    const mine = ++asked;
    const value = (id) => $(id).value;
    const tests = [];
    if (value("by-run")) tests.push((i) => table.run[i] === Number(value("by-run")));
    if (value("by-task")) tests.push((i) => table.task[i] === Number(value("by-task")));
    if (value("by-score")) tests.push((i) => correct(i) === (value("by-score") === "correct"));
    if (value("by-code")) tests.push(CODE[value("by-code")]);
    if (value("by-end")) tests.push(END[value("by-end")]);
    if (value("from-step")) tests.push((i) => table.step[i] >= Number(value("from-step")));
    if (value("to-step")) tests.push((i) => table.step[i] !== null && table.step[i] <= Number(value("to-step")));
    if ($("shared").checked) tests.push((i) => isShared.has(table.problem[i]));
    const words = value("search").toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length) {
      if (!texts) $("count").textContent = "Searching …";
      const all = await searchable();
      if (mine !== asked) return;
      tests.push((i) => words.every((word) => all[i].includes(word)));
    }
    shown = [];
    for (let i = 0; i < count; i += 1) if (tests.every((test) => test(i))) shown.push(i);
    if (value("order")) shown.sort(ORDER[value("order")]);
    const right = shown.filter(correct).length;
    $("count").textContent = shown.length ? `${shown.length} of ${count}, ${right} of them correct` : `none of ${count}; Clear takes the filters away`;
    rebuild();
  };

  // --- the list: items are made as they come into sight

  const list = $("list");
  const PAGE = 60;

  const item = (place) => {
    const i = shown[place];
    const facts = [element("span", { class: correct(i) ? "good" : "bad" }, correct(i) ? "✓ correct" : "✗ wrong"), element("span", {}, visible(taskOf(i)))];
    if (runs.length > 1) facts.push(element("span", {}, element("span", { class: "swatch", style: `background: var(--s${table.run[i] % 8})` }), visible(runs[table.run[i]])));
    if (table.step[i] !== null) facts.push(element("span", {}, `step ${table.step[i]}`));
    if (names.setting[table.setting[i]]) facts.push(element("span", {}, visible(names.setting[table.setting[i]])));
    facts.push(element("span", {}, table.calls[i] ? `${table.calls[i]} program${table.calls[i] > 1 ? "s" : ""}${table.failed[i] ? `, ${table.failed[i]} failed` : ""}` : "no program"));
    if (table.advantage[i] !== null) facts.push(element("span", {}, `adv. ${number(table.advantage[i], 2)}`));
    return element(
      "li",
      { role: "option", id: `row-${i}`, "data-place": place, "aria-posinset": place + 1, "aria-setsize": shown.length, "aria-selected": place === active ? "true" : "false" },
      element("div", { class: "question" }, visible(table.question[i] || problemOf(i))),
      element("div", { class: "facts-line" }, ...facts),
    );
  };
  const extend = (until) => {
    const from = list.children.length;
    const made = [];
    for (let place = from; place < Math.min(shown.length, until); place += 1) made.push(item(place));
    list.append(...made);
  };
  const rebuild = () => {
    const before = list.querySelector('[aria-selected="true"]')?.id;
    list.replaceChildren();
    active = before ? shown.findIndex((i) => `row-${i}` === before) : -1;
    list.scrollTop = 0;
    extend(Math.max(PAGE, active + 10));
    mark();
  };
  const mark = () => {
    list.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
    if (active < 0) {
      list.removeAttribute("aria-activedescendant");
      return;
    }
    const row = list.children[active];
    row.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", row.id);
  };
  const choose = (place, isRead = false) => {
    if (!shown.length) return;
    active = Math.max(0, Math.min(shown.length - 1, place));
    extend(active + 10);
    mark();
    const row = list.children[active];
    const top = row.offsetTop - list.offsetTop;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + row.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + row.offsetHeight - list.clientHeight;
    open(shown[active]).then(() => isRead && read());
  };
  const isNarrow = () => matchMedia("(max-width: 760px)").matches;
  const read = () => {
    $("detail").focus({ preventScroll: true });
    if (isNarrow()) $("detail").scrollIntoView({ block: "start" });
  };
  list.addEventListener("scroll", () => {
    if (list.scrollTop + list.clientHeight > list.scrollHeight - 400) extend(list.children.length + PAGE);
  });
  list.addEventListener("click", (event) => {
    const row = event.target.closest("li");
    if (row) choose(Number(row.dataset.place), isNarrow());
  });
  list.addEventListener("focus", () => {
    if (active < 0 && shown.length && list.matches(":focus-visible")) choose(0);
  });
  list.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(list.clientHeight / (list.children[0]?.offsetHeight || 60)) - 1);
    const to = { ArrowDown: active + 1, ArrowUp: active - 1, PageDown: active + page, PageUp: active - page, Home: 0, End: shown.length - 1 }[event.key];
    if (event.key === "Enter") read();
    else if (to === undefined) return;
    else choose(to);
    event.preventDefault();
  });

  // --- the detail

  const titleOf = (i) => [runs.length > 1 ? runs[table.run[i]] : "", table.step[i] === null ? "" : `step ${table.step[i]}`, names.setting[table.setting[i]], `sample ${table.sample[i] + 1}`].filter(Boolean).join(", ");
  const column = (i, whole, heading) => {
    const tokens = whole.sizes.length ? tokensOf(whole) : [];
    const view = { whole, tokens, next: 0 };
    const budget = table.budget[i];
    const chips = [
      ["task", taskOf(i)],
      ["problem", problemOf(i)],
      ["right answer", whole.truth],
      ["answer", whole.answer ?? "none"],
      ["verdict", names.reason[table.reason[i]]],
      ["reward", number(table.reward[i])],
      ["advantage", table.reward[i] === null ? null : (number(table.advantage[i]) ?? "not trained on")],
      ["group", table.group[i] === null ? null : String(table.group[i] + 1)],
      ["programs", budget === null ? String(table.calls[i]) : `${table.calls[i]} of at most ${budget}${usedUp(i) ? ", budget used up" : ""}`],
      ["tokens", String(table.tokens[i])],
      ["ended by", names.stop[table.stop[i]] === "eos" ? "its own end" : names.stop[table.stop[i]]],
    ].filter(([, value]) => value !== null && value !== "");
    const box = textOf(view);
    watchTokens(box, view);
    return element(
      "article",
      { class: "trajectory" },
      element("h3", {}, element("span", { class: `badge ${correct(i) ? "good" : "bad"}` }, correct(i) ? "correct" : "wrong"), element("span", {}, visible(titleOf(i)))),
      heading ? element("p", { class: "question" }, visible(whole.question || "")) : null,
      element("dl", { class: "chips" }, ...chips.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, visible(String(value)))))),
      box,
    );
  };

  // Others on the same problem, other runs' first.
  const others = (i) => ofProblem.get(table.problem[i]).filter((j) => j !== i).sort((a, b) => (table.run[a] === table.run[i]) - (table.run[b] === table.run[i]) || a - b);

  let current = -1;
  let beside = null;
  let isShaded = true;
  const detail = $("detail");

  const open = async (i) => {
    current = i;
    const whole = await wholeOf(i);
    if (current !== i) return;
    const rivals = others(i);
    // On another problem, the run that was chosen stays.
    const partner = beside === null ? undefined : (rivals.find((j) => j === beside) ?? rivals.find((j) => table.run[j] === table.run[beside]) ?? rivals[0]);
    const second = partner === undefined ? null : await wholeOf(partner);
    if (current !== i) return;
    tip.hide();

    const compare = element("select", { id: "beside" }, element("option", { value: "" }, rivals.length ? "nothing" : "no other on this problem"));
    const last = table.run[i];
    for (const [n, name] of [...runs.entries()].sort((a, b) => (a[0] === last) - (b[0] === last))) {
      const own = rivals.filter((j) => table.run[j] === n);
      if (own.length) compare.append(element("optgroup", { label: visible(name) }, ...own.map((j) => element("option", { value: j }, `${correct(j) ? "✓" : "✗"} ${visible(titleOf(j))}`))));
    }
    compare.disabled = !rivals.length;
    compare.value = partner === undefined ? "" : String(partner);
    compare.addEventListener("change", async () => {
      beside = compare.value === "" ? null : Number(compare.value);
      await open(i);
      $("beside").focus();
    });
    const shade = element("input", { type: "checkbox", id: "shade" });
    shade.checked = isShaded;
    shade.addEventListener("change", () => {
      isShaded = shade.checked;
      detail.classList.toggle("shaded", isShaded);
    });
    const back = element("button", { type: "button", class: "only-narrow" }, "To the list");
    back.addEventListener("click", leave);
    const key = element("span", { class: "key" }, ...[["model", "--card"], ["code", "--code"], ["tool", "--tool"], ["prompt", "--prompt"]].map(([name, colour]) => element("span", { style: `--of: var(${colour})` }, name)));
    const bar = element("div", { class: "bar" }, back, element("label", {}, "Beside it", compare), element("label", {}, shade, "shade unlikely tokens"), key);
    const columns = element("div", { class: `columns${second ? " two" : ""}` }, column(i, whole, !second), second ? column(partner, second, false) : null);
    detail.classList.toggle("shaded", isShaded);
    detail.replaceChildren(bar, ...(second ? [element("p", { class: "question" }, visible(whole.question || ""))] : []), columns);
    detail.dataset.shown = i;
  };
  const leave = () => {
    list.focus({ preventScroll: true });
    if (isNarrow()) list.scrollIntoView({ block: "center" });
  };
  detail.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.target.closest("input, select, textarea") && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      $("search").focus();
    }
  });
  addEventListener("scroll", () => tip.hide(), { passive: true });

  const controls = ["by-run", "by-task", "by-score", "by-code", "by-end", "from-step", "to-step", "order", "shared"];
  for (const id of controls) $(id).addEventListener("input", filter);
  let waiting = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 150);
  });
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      list.focus();
    }
  });
  $("clear").addEventListener("click", () => {
    for (const id of [...controls, "search"]) {
      if ($(id).type === "checkbox") $(id).checked = false;
      else $(id).value = "";
    }
    filter();
  });
  return filter().then(() => {
    // What a reader wants to see first: a response that runs a program.
    const first = shown.findIndex((i) => table.calls[i] > 0);
    if (shown.length && !isNarrow()) choose(Math.max(0, first));
  });
}

async function start() {
  const index = await unpack($("index"));
  watchCharts(index.charts, index.runs);
  if ($("list")) await browse(index, [...document.querySelectorAll("script.chunk")]);
  document.documentElement.dataset.readyMs = Math.round(performance.now());
}

start().catch((error) => {
  console.error(error);
  const note = $("failure");
  if (!note) return;
  note.textContent = typeof DecompressionStream === "undefined" ? "This browser is too old to show the trajectories (it has no DecompressionStream: Chrome 80, Firefox 113 and Safari 16.4 have)." : `The trajectories cannot be shown: ${error}`;
  note.hidden = false;
});
