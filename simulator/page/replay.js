"use strict";
// Which keys a policy keeps, at any time. Times count the queries that were read, from 1; tokens count from 0, so that
// the query of token i is read at i + 1.
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
    spec,
    index,
    until,
    gone,
    lost,
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
    make("strong", {}, `${percent(kept / read)} kept`),
    ` in ${scope()}: ${count(kept)} of ${count(read)} keys`,
  );
}

function paintMap(policy) {
  for (let head = 0; head < pairs; head++) {
    const shade = Math.round((100 * (now.time - policy.missing[head])) / now.time);
    if (policy.shades[head] === shade) continue;
    policy.cells[head].style.setProperty("--percent", shade);
    policy.shades[head] = shade;
  }
  if (policy.pointed) describeCell(policy);
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
    if (place.bottom > box.bottom - 40 || place.top < box.top)
      policy.text.scrollTop += place.top - box.top - box.height / 2;
  }
}

function togglePlay() {
  if (now.playing) {
    pause();
    return goTo(now.time); // a frame that was asked for shows nothing new
  }
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
  $("least").textContent = now.heads === 1 ? "not held" : "held by no head";
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
