// What stands on the page for each policy: its name, the map of its heads and the text; and the curves of both.

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
  const panel = make(
    "section",
    { class: "panel", "aria-labelledby": title.id },
    title,
    policy.summary,
    policy.table,
    policy.text,
  );
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
  text.append(...linesOf(policy.spans));
  return text;
}

// An element for each line of the text, so that the browser lays out and paints only those that are seen or changed.
function linesOf(spans) {
  const lines = [];
  spans.forEach((span, token) => {
    if (token === 0 || about.pieces?.[token - 1].endsWith("\n") || (about.pieces === null && token % 64 === 0))
      lines.push(make("div", { class: "line" }));
    lines.at(-1).append(span);
  });
  return lines;
}

function makeMap(policy) {
  const { layers, heads } = about;
  const every = Math.ceil(layers.length / 12);
  const button = (label, layer, head, ...children) => {
    const made = make(
      "button",
      { type: "button", tabindex: -1, "aria-pressed": false, "aria-label": label },
      ...children,
    );
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
  policy.shades = new Int32Array(pairs).fill(-1); // of each cell, in percent
  policy.caption = make("caption", { "aria-live": "polite" });
  const map = make("table", { class: "map" }, policy.caption, make("thead", {}, top), body);
  map.style.setProperty("--row", `${Math.max(7, Math.min(18, Math.floor(180 / heads)))}px`);
  map.style.setProperty("--columns", layers.length);
  policy.cells[0].tabIndex = 0;
  describeCell(policy);
  return map;
}

function describeCell(policy) {
  const cell = policy.pointed;
  if (!cell) {
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
  const share = `${count(kept)} of ${count(read)} keys, ${percent(kept / read)}`;
  policy.caption.textContent = `${cell.getAttribute("aria-label")} keeps ${share}`;
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
