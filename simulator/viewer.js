"use strict";
// Which keys a policy keeps, at any time. Times count the queries that were read, from 1; tokens count from 0.
// An evicted key never comes back: `gone[head * tokens + token]` is the time from which on it is missing, and all
// that a move of the slider changes lies in the evictions between the two times. "Head" is layer * heads + head.

const NEVER = 65535;
const JUMP = 64;
const SECONDS = 40; // to play a whole text, at most
const PACE = 12; // queries played a second, at least
const NAMES = ["first", "second"];
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en-US");
const percent = (share) => `${(100 * share).toFixed(1)}%`;

let about; // what the page is about: see `page` in viewer.py
let arrays; // whole numbers, by name
let policies = []; // see `makePolicy`
let pairs = 0; // pairs of a layer and a head
const now = { time: 0, wanted: 1, chosen: null, held: false, layer: null, head: null, playing: 0, heads: 0 };

// ---- Data

async function readArrays(text, sizes) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const total = bytes.length / 2;
  const numbers = new Uint16Array(total);
  for (let i = 0; i < total; i++) numbers[i] = bytes[i] | (bytes[total + i] << 8);
  const found = {};
  let at = 0;
  for (const [name, size] of sizes) {
    found[name] = numbers.subarray(at, at + size);
    at += size;
  }
  return found;
}

function makePolicy(spec, index) {
  const { tokens } = about;
  const [until, lost] = [arrays[`until${index}`], arrays[`lost${index}`]];
  const gone = until.map((time, i) => (time === NEVER ? NEVER : time + lost[i]));
  return {
    spec, index, until, gone, lost,
    ...byTime(gone, tokens),
    missing: new Int32Array(pairs), // evicted keys of each head at the time that is shown
    evicted: new Int32Array(tokens), // of each token, heads among the visible ones that evicted it
    shown: new Int32Array(tokens).fill(-2), // of each token, the number that the page shows: -1 before it is read
    curve: new Float64Array(tokens + 1), // keys kept by the visible heads, by time
  };
}

// The evictions in order of time: those at time t are order[start[t]] to order[start[t + 1] - 1], indices into gone.
function byTime(gone, tokens) {
  const start = new Uint32Array(tokens + 3);
  for (const time of gone) if (time <= tokens) start[time + 1]++;
  for (let t = 1; t < start.length; t++) start[t] += start[t - 1];
  const order = new Uint32Array(start[tokens + 1]);
  const next = start.slice();
  for (let i = 0; i < gone.length; i++) if (gone[i] <= tokens) order[next[gone[i]]++] = i;
  return { start, order };
}

function visible(head) {
  if (now.layer === null) return now.head === null || head % about.heads === now.head;
  const layer = Math.floor(head / about.heads);
  return layer === now.layer && (now.head === null || head % about.heads === now.head);
}

// ---- Moving in time

function move(policy, from, to) {
  const { order, start, missing, evicted } = policy;
  const [first, last, sign] = from < to ? [from, to, 1] : [to, from, -1];
  for (let i = start[first + 1]; i < start[last + 1]; i++) {
    const head = Math.floor(order[i] / about.tokens);
    missing[head] += sign;
    if (mask[head]) evicted[order[i] - head * about.tokens] += sign;
  }
}

let mask = new Uint8Array(0);

function heldBy(policy, token) {
  return token < now.time ? now.heads - policy.evicted[token] : -1;
}

function showTime(time) {
  for (const policy of policies) move(policy, now.time, time);
  now.time = time;
  policies.forEach(paint);
  $("time").value = time;
  $("time").setAttribute("aria-valuetext", `${count(time)} of ${count(about.tokens)} queries read`);
  $("clock").textContent = `${count(time)} of ${count(about.tokens)} read`;
  moveCursor($("curves").querySelector(".now"), time);
  if (now.playing && $("follow").checked) follow();
}

// Changes what differs from what is shown, and nothing else.
function paint(policy) {
  const { spans, shown } = policy;
  for (let token = 0; token < shown.length; token++) {
    const held = heldBy(policy, token);
    if (held === shown[token]) continue;
    if (held > 0) spans[token].style.setProperty("--held", held);
    if (held < 1 || shown[token] < 1) {
      spans[token].classList.toggle("future", held < 0);
      spans[token].classList.toggle("none", held === 0);
    }
    shown[token] = held;
  }
  const newest = spans[now.time - 1];
  if (policy.newest !== newest) {
    policy.newest?.classList.remove("newest");
    newest.classList.add("newest");
    policy.newest = newest;
  }
  paintMap(policy);
  const kept = policy.curve[now.time];
  const read = now.heads * now.time;
  policy.summary.replaceChildren(
    make("strong", {}, `${percent(kept / read)} kept`), ` in ${scope()}: ${count(kept)} of ${count(read)} keys`,
  );
}

function paintMap(policy) {
  for (let head = 0; head < pairs; head++) {
    const kept = now.time - policy.missing[head];
    if (policy.mapped[head] === kept && policy.mappedAt === now.time) continue;
    policy.cells[head].style.setProperty("--share", (kept / now.time).toFixed(4));
    policy.mapped[head] = kept;
  }
  policy.mappedAt = now.time;
  describeCell(policy);
}

let frame = 0;

function goTo(time) {
  now.wanted = Math.max(1, Math.min(about.tokens, Math.round(time)));
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    showTime(now.wanted);
    if (now.chosen !== null) inspect();
  });
}

function follow() {
  for (const policy of policies) {
    const box = policy.text.getBoundingClientRect();
    const place = policy.newest.getBoundingClientRect();
    if (place.bottom > box.bottom - 40 || place.top < box.top) policy.text.scrollTop += place.top - box.top - box.height / 2;
  }
}

function togglePlay() {
  if (now.playing) return pause();
  const [begin, from] = [performance.now(), now.wanted >= about.tokens ? 1 : now.wanted];
  const pace = Math.max(PACE, about.tokens / SECONDS);
  const advance = (at) => {
    if (!now.playing) return;
    const time = from + (pace * (at - begin)) / 1000;
    if (Math.round(time) !== now.time) goTo(time);
    if (time >= about.tokens) return pause();
    now.playing = requestAnimationFrame(advance);
  };
  now.playing = requestAnimationFrame(advance);
  $("play").textContent = "Pause";
}

function pause() {
  cancelAnimationFrame(now.playing);
  now.playing = 0;
  $("play").textContent = "Play";
}

// ---- Which heads are shown

function scope() {
  const layer = now.layer === null ? "" : `layer ${about.layers[now.layer]}`;
  const head = now.head === null ? "" : `head ${now.head}`;
  if (!layer && !head) return pairs === 1 ? "the only head" : `all ${pairs} heads`;
  return [layer, head].filter(Boolean).join(", ") + (layer ? "" : " of every layer");
}

function restrict(layer, head) {
  const same = layer === now.layer && head === now.head;
  [now.layer, now.head] = same ? [null, null] : [layer, head];
  mask = Uint8Array.from({ length: pairs }, (_, index) => visible(index));
  now.heads = mask.reduce((sum, one) => sum + one, 0);
  for (const policy of policies) {
    recount(policy);
    policy.table.querySelectorAll("button").forEach((button) => {
      const pressed = button.dataset.layer === String(now.layer) && button.dataset.head === String(now.head);
      button.setAttribute("aria-pressed", pressed);
    });
  }
  document.body.style.setProperty("--heads", now.heads);
  $("most").textContent = now.heads === 1 ? "held" : `all ${now.heads} heads`;
  $("everything").hidden = now.layer === null && now.head === null;
  drawCurves();
  showTime(now.time || now.wanted);
  if (now.chosen !== null) inspect();
}

function recount(policy) {
  const { tokens } = about;
  policy.evicted.fill(0);
  policy.curve.fill(0);
  for (let head = 0; head < pairs; head++) {
    if (!mask[head]) continue;
    for (let token = 0; token < tokens; token++) {
      const time = policy.gone[head * tokens + token];
      if (time <= now.time) policy.evicted[token]++;
      if (time <= tokens) policy.curve[time]--;
    }
  }
  for (let t = 1; t <= tokens; t++) policy.curve[t] += policy.curve[t - 1] + now.heads;
}

// ---- Elements

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function draw(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

const SIGNS = { "\n": "⏎\n", "\r": "␍", "\t": "⇥\t" };
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cn}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu;

// Text in which every character can be seen; none may change how others are read.
function printable(text) {
  return text.replace(HIDDEN, (sign) => SIGNS[sign] ?? `\\u{${sign.codePointAt(0).toString(16)}}`);
}

function word(token) {
  const piece = about.pieces?.[token];
  if (piece === undefined) return `${about.positions[token]}`;
  return printable(piece).replaceAll("\n", "").replaceAll(" ", "␣") || "(empty)";
}

function makePanel(policy) {
  policy.summary = make("p", { class: "summary" });
  policy.table = makeMap(policy);
  policy.text = makeText(policy);
  const title = make("h2", { id: `policy${policy.index}` }, policies.length > 1 ? swatchOf(policy) : "", policy.spec);
  const panel = make("section", { class: "panel", "aria-labelledby": title.id }, title, policy.summary, policy.table, policy.text);
  $("panels").append(panel);
}

function makeText(policy) {
  const text = make("div", { class: "text", tabindex: 0, role: "group", "aria-label": `the text, ${policy.spec}` });
  policy.spans = Array.from({ length: about.tokens }, (_, token) => {
    const piece = about.pieces === null ? word(token) : printable(about.pieces[token]);
    const span = make("span", { class: about.pieces === null ? "token position" : "token" }, piece);
    span.dataset.token = token;
    return span;
  });
  text.append(...policy.spans);
  return text;
}

function makeMap(policy) {
  const { layers, heads } = about;
  const every = Math.ceil(layers.length / 12);
  const button = (label, layer, head, ...children) => {
    const made = make("button", { type: "button", tabindex: -1, "aria-pressed": false, "aria-label": label }, ...children);
    Object.assign(made.dataset, { layer, head });
    return made;
  };
  const top = make("tr", {}, make("th", { scope: "col" }, "layer"));
  layers.forEach((number, layer) => {
    const name = make("span", {}, `${number}`);
    const shown = layer % every === 0 ? "tick" : "";
    top.append(make("th", { scope: "col", class: shown }, button(`layer ${number}`, layer, null, name)));
  });
  const body = make("tbody");
  const rows = [];
  for (let head = 0; head < heads; head++) {
    const name = button(`head ${head} of every layer`, null, head, heads <= 16 || head % 8 === 0 ? `head ${head}` : "");
    const cells = layers.map((number, layer) => button(`layer ${number}, head ${head}`, layer, head));
    rows.push(cells);
    body.append(make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, cell))));
  }
  policy.cells = layers.flatMap((_, layer) => rows.map((cells) => cells[layer]));
  policy.mapped = new Int32Array(pairs).fill(-1);
  policy.caption = make("caption", { "aria-live": "polite" });
  const map = make("table", { class: "map" }, policy.caption, make("thead", {}, top), body);
  map.style.setProperty("--row", `${Math.max(7, Math.min(18, Math.floor(180 / heads)))}px`);
  policy.cells[0].tabIndex = 0;
  return map;
}

function describeCell(policy) {
  const cell = policy.pointed;
  if (cell === undefined) {
    policy.caption.textContent = "Point at a cell for its number; click to see that head alone.";
    return;
  }
  const [layer, head] = [cell.dataset.layer, cell.dataset.head].map((text) => (text === "null" ? null : Number(text)));
  let [kept, heads] = [0, 0];
  for (let index = 0; index < pairs; index++) {
    const [ofLayer, ofHead] = [Math.floor(index / about.heads), index % about.heads];
    if ((layer ?? ofLayer) !== ofLayer || (head ?? ofHead) !== ofHead) continue;
    kept += now.time - policy.missing[index];
    heads++;
  }
  const read = heads * now.time;
  policy.caption.textContent = `${cell.getAttribute("aria-label")} keeps ${count(kept)} of ${count(read)} keys, ${percent(kept / read)}`;
}

function drawCurves() {
  const [width, height] = [1000, 100];
  const svg = $("curves");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(...[0, 50, 100].map((y) => draw("line", { class: "frame", x1: 0, x2: width, y1: y, y2: y })));
  for (const policy of policies) {
    const points = samples(1, about.tokens, 400).map((t) => {
      const share = policy.curve[t] / (now.heads * t);
      return `${across(t) * width},${(height * (1 - share)).toFixed(2)}`;
    });
    svg.append(draw("polyline", { class: NAMES[policy.index], points: points.join(" ") }));
  }
  svg.append(draw("line", { class: "now", y1: 0, y2: height }));
}

function samples(from, to, most) {
  const size = Math.min(most, to - from + 1);
  return Array.from({ length: size }, (_, i) => Math.round(from + ((to - from) * i) / Math.max(1, size - 1)));
}

function across(time) {
  return (time - 1) / Math.max(1, about.tokens - 1);
}

function moveCursor(line, time) {
  for (const end of ["x1", "x2"]) line.setAttribute(end, across(time) * 1000);
}

// ---- The chosen token

function choose(token) {
  if (token === now.chosen) return;
  mark("chosen", now.chosen === null ? [] : [now.chosen], false);
  mark("looker", now.lookers ?? [], false);
  now.chosen = token;
  now.lookers = looksAt(token).map((look) => look.query);
  mark("chosen", [token], true);
  mark("looker", now.lookers, true);
  inspect();
}

function mark(name, tokens, on) {
  for (const policy of policies) for (const token of tokens) policy.spans[token].classList.toggle(name, on);
}

function looksAt(token) {
  const size = about.looks[0] + about.looks[1];
  const found = [];
  for (let i = token * size; i < (token + 1) * size; i++) {
    if (arrays.query[i] === NEVER) continue;
    found.push({ query: arrays.query[i], head: arrays.head[i], attention: arrays.attention[i] / 10000 });
  }
  return found;
}

// When the visible heads evict a token.
function fate(policy, token) {
  const { tokens } = about;
  const times = [];
  let again = 0;
  let lost = 0;
  for (let head = 0; head < pairs; head++) {
    const at = head * tokens + token;
    if (!mask[head]) continue;
    if (policy.gone[at] === NEVER) continue;
    times.push(policy.gone[at]);
    again += arrays.needed[at] > policy.until[at];
    lost += policy.lost[at];
  }
  times.sort((a, b) => a - b);
  return { times, again, lost };
}

function inspect() {
  const token = now.chosen;
  const open = $("chosen").querySelector("details")?.open ?? false;
  const place = `Token ${count(token)}`;
  const id = about.ids === null ? "" : `, id ${about.ids[token]}`;
  const title = make("h2", {}, `${place} `, make("span", { class: "word-shown" }, word(token)));
  const details = make("p", { class: "note" }, `Read by query ${count(token + 1)}${id}. ${now.held ? "Held: Esc lets go." : "Click, or press Enter, to hold on to it."}`);
  $("chosen").replaceChildren(title, details, fateTable(token), drawLife(token), lifeNote(), ...looksTable(token), byHead(token, open));
}

function fateTable(token) {
  const fates = policies.map((policy) => fate(policy, token));
  const time = (at) => (at === undefined ? "never" : `at ${count(at)}`);
  const [one, of] = [now.heads, ` of ${now.heads}`];
  const rows = [
    [`held now, of ${one} head${one === 1 ? "" : "s"}`, (_, policy) => (token < now.time ? count(heldBy(policy, token)) : "not read yet")],
    ["first eviction", ({ times }) => time(times[0])],
    ["half have evicted it", ({ times }) => time(times[Math.ceil(one / 2) - 1])],
    ["last eviction", ({ times }) => time(times.at(-1))],
    ["never evicted in", ({ times }) => `${one - times.length}${of}`],
    ["evicted, important again later in", ({ again }) => `${again}${of}`],
  ];
  if (fates.some(({ lost }) => lost)) rows.push(["lost for want of a slot in", ({ lost }) => `${lost}${of}`]);
  const table = make("table", { class: "numbers" });
  if (policies.length > 1) {
    const heads = policies.map((policy) => make("th", { scope: "col" }, swatchOf(policy), nameOf(policy)));
    table.append(make("tr", {}, make("td"), ...heads));
  }
  for (const [name, show] of rows) {
    const cells = fates.map((one, index) => make("td", {}, `${show(one, policies[index])}`));
    table.append(make("tr", {}, make("th", { scope: "row" }, name), ...cells));
  }
  return table;
}

// The name in a SPEC, with a number where both policies have the same name.
function nameOf(policy) {
  const [name, ...others] = policies.map(({ spec }) => spec.split(":")[0]);
  return others.includes(name) ? `${name} ${policy.index + 1}` : policy.spec.split(":")[0];
}

function swatchOf(policy) {
  const swatch = draw("svg", { class: "swatch", viewBox: "0 0 26 8", "aria-hidden": "true" });
  swatch.append(draw("line", { class: NAMES[policy.index], x1: 0, x2: 26, y1: 4, y2: 4 }));
  return swatch;
}

// How many of the visible heads hold the token, over time, and the strongest looks below.
function drawLife(token) {
  const svg = draw("svg", { id: "life", viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img" });
  svg.setAttribute("aria-label", "heads that hold the token, over time");
  for (const y of [0, 70]) svg.append(draw("line", { x1: 0, x2: 1000, y1: y, y2: y }));
  for (const policy of policies) {
    const { times } = fate(policy, token);
    const points = [[across(token + 1), 0]];
    times.forEach((time, index) => points.push([across(time), index], [across(time), index + 1]));
    points.push([1, times.length]);
    const drawn = points.map(([x, gone]) => `${(1000 * x).toFixed(1)},${((70 * gone) / now.heads).toFixed(2)}`);
    svg.append(draw("polyline", { class: NAMES[policy.index], points: drawn.join(" ") }));
  }
  const looks = looksAt(token);
  const most = Math.max(...looks.map((look) => look.attention));
  for (const { query, attention } of looks) {
    const x = 1000 * across(query + 1);
    svg.append(draw("line", { class: "look", x1: x, x2: x, y1: 100, y2: 98 - (22 * attention) / most }));
  }
  const line = draw("line", { class: "now", y1: 0, y2: 100 });
  moveCursor(line, now.time);
  svg.append(line);
  return svg;
}

function lifeNote() {
  return make("p", { class: "note" }, `Above: heads that hold the key, from ${now.heads === 1 ? "one" : `all ${now.heads}`} (top) to none, over the whole text. The strokes are the queries that looked at it, listed below; the longer, the more attention.`);
}

function looksTable(token) {
  const looks = looksAt(token);
  const title = make("h3", {}, "Who looked at it, with the full cache");
  if (!looks.length) return [title, make("p", { class: "note" }, "No later query did.")];
  const table = make("table", { class: "looks" });
  const columns = ["query", "", "later by", "layer", "head", "attention", ...policies.map((policy) => (policies.length > 1 ? nameOf(policy) : "key"))];
  table.append(make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name))));
  for (const look of looks) {
    const { query, head, attention } = look;
    const row = [count(query), word(query), count(query - token), about.layers[Math.floor(head / about.heads)], head % about.heads, percent(attention)];
    const cells = row.map((text, index) => make("td", index === 1 ? { class: "word" } : {}, `${text}`));
    for (const policy of policies) {
      const there = policy.until[head * about.tokens + token] > query;
      cells.push(make("td", there ? {} : { class: "missed" }, there ? "held" : `evicted ${count(policy.gone[head * about.tokens + token])}`));
    }
    table.append(make("tr", {}, ...cells));
  }
  return [title, table];
}

function byHead(token, open) {
  const details = make("details", {}, make("summary", {}, "When each head evicts it"));
  const fill = () => details.open && details.children.length === 1 && details.append(...byHeadTable(token));
  details.addEventListener("toggle", fill);
  details.open = open;
  fill();
  return details;
}

function byHeadTable(token) {
  const { layers, heads, tokens } = about;
  return policies.flatMap((policy) => {
    const table = make("table", { class: "by-head" });
    const top = Array.from({ length: heads }, (_, head) => make("th", { scope: "col" }, `head ${head}`));
    table.append(make("tr", {}, make("th", { scope: "col" }, "layer"), ...top));
    layers.forEach((number, layer) => {
      const cells = Array.from({ length: heads }, (_, head) => {
        const at = (layer * heads + head) * tokens + token;
        const again = policy.gone[at] !== NEVER && arrays.needed[at] > policy.until[at];
        return make("td", again ? { class: "again" } : {}, policy.gone[at] === NEVER ? "–" : count(policy.gone[at]) + (again ? "*" : ""));
      });
      table.append(make("tr", {}, make("th", { scope: "row" }, `${number}`), ...cells));
    });
    return [make("h3", {}, policy.spec), table, make("p", { class: "note" }, "–: never. *: a later query would have found it important.")];
  });
}

function hold(token) {
  const again = now.held && token === now.chosen;
  now.held = !again;
  if (token === now.chosen) inspect();
  else choose(token);
}

function release() {
  now.held = false;
  if (now.layer !== null || now.head !== null) restrict(null, null);
  else if (now.chosen !== null) inspect();
}

// ---- Keyboard and pointer

function tokenAt(event) {
  const token = event.target.closest?.(".text .token")?.dataset.token;
  return token === undefined ? null : Number(token);
}

function listenToText(policy) {
  const { text } = policy;
  text.addEventListener("pointerover", (event) => {
    if (!now.held && tokenAt(event) !== null) choose(tokenAt(event));
  });
  text.addEventListener("click", (event) => tokenAt(event) !== null && hold(tokenAt(event)));
  text.addEventListener("focus", () => text.matches(":focus-visible") && now.chosen === null && choose(0));
  text.addEventListener("keydown", (event) => moveInText(event, policy));
  text.addEventListener("scroll", () => {
    for (const other of policies) if (other.text.scrollTop !== text.scrollTop) other.text.scrollTop = text.scrollTop;
  });
}

function moveInText(event, policy) {
  const from = now.chosen ?? 0;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -lineOf(policy, from), ArrowDown: lineOf(policy, from) };
  const ends = { Home: 0, End: about.tokens - 1 };
  if (event.key === "Enter") hold(from);
  else if (event.key in steps) choose(Math.max(0, Math.min(about.tokens - 1, from + steps[event.key])));
  else if (event.key in ends) choose(ends[event.key]);
  else return;
  event.preventDefault();
  policy.spans[now.chosen].scrollIntoView({ block: "nearest" });
}

// About as many tokens as a line holds.
function lineOf(policy, token) {
  const { spans } = policy;
  const top = spans[token].offsetTop;
  let end = token;
  while (end < spans.length - 1 && spans[end].offsetTop === top) end++;
  let begin = token;
  while (begin > 0 && spans[begin].offsetTop === top) begin--;
  return Math.max(1, end - begin - 1);
}

function listenToMap(policy) {
  const { table } = policy;
  const point = (event) => {
    policy.pointed = event.target.closest?.("button") ?? undefined;
    describeCell(policy);
  };
  table.addEventListener("pointerover", point);
  table.addEventListener("focusin", point);
  table.addEventListener("pointerleave", () => {
    policy.pointed = undefined;
    describeCell(policy);
  });
  table.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const [layer, head] = [button.dataset.layer, button.dataset.head].map((text) => (text === "null" ? null : Number(text)));
    restrict(layer, head);
  });
  table.addEventListener("keydown", (event) => moveInMap(event, table));
}

function moveInMap(event, table) {
  const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
  const cell = event.target.closest("th, td");
  if ((!x && !y) || !cell) return;
  const row = table.rows[cell.parentNode.rowIndex + y];
  const next = row?.cells[cell.cellIndex + x]?.querySelector("button");
  event.preventDefault();
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function listenToKeys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const steps = { ",": -1, ".": 1, "<": -JUMP, ">": JUMP };
  const onControl = event.target.closest("button, summary, input[type=checkbox]");
  if (event.key === " " && !onControl) togglePlay();
  else if (event.key === "Escape") release();
  else if (event.key in steps) stepBy(steps[event.key]);
  else if (event.target === document.body && ["ArrowLeft", "ArrowRight"].includes(event.key)) stepBy(event.key === "ArrowLeft" ? -1 : 1);
  else return;
  event.preventDefault();
}

function stepBy(steps) {
  pause();
  goTo(now.wanted + steps);
}

function listen() {
  $("time").addEventListener("input", () => {
    pause();
    goTo(Number($("time").value));
  });
  $("play").addEventListener("click", togglePlay);
  $("everything").addEventListener("click", () => restrict(null, null));
  document.addEventListener("keydown", listenToKeys);
  for (const policy of policies) {
    listenToText(policy);
    listenToMap(policy);
  }
}

// ---- Beginning

function describe() {
  const { model, tokens, layers, heads, group, options, looks, far } = about;
  const shape = `${count(tokens)} tokens, ${layers.length} layer${layers.length === 1 ? "" : "s"} of ${heads} key-value head${heads === 1 ? "" : "s"}`;
  const how = [options.fidelity, options.chunk > 1 ? `chunks of ${options.chunk}` : "", options.capacity ? `${count(options.capacity)} slots a head` : "", options.prompt ? `a prompt of ${count(options.prompt)}` : ""];
  $("about").textContent = [model.trim() || "a trace", shape, ...how.filter(Boolean)].join(" · ");
  $("looks-note").textContent =
    `Who looked: attention with the full cache${group > 1 ? `, the mean of the ${group} query heads that share a key` : ""}. Of each token this page holds the ` +
    `${looks[0]} strongest queries less than ${far} tokens later and the ${looks[1]} strongest after those, each with the head in which it looked most; all others are left out.`;
  $("left-out").append(...about.left_out.map((sentence) => make("li", {}, sentence)));
  $("time").max = tokens;
}

async function begin() {
  about = JSON.parse($("data").textContent);
  arrays = await readArrays($("arrays").textContent, about.arrays);
  pairs = about.layers.length * about.heads;
  policies = about.policies.map(makePolicy);
  describe();
  policies.forEach(makePanel);
  now.wanted = about.tokens;
  restrict(null, null);
  listen();
  $("time").focus({ focusVisible: false });
  document.body.dataset.ready = "true";
}

begin().catch((error) => {
  $("failure").textContent = `This page cannot be shown: ${error.message}. It needs a browser of 2023 or later.`;
  $("failure").hidden = false;
});
