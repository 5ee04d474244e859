// The chosen token: when it is evicted, and which queries attend to it most.

function choose(token) {
  if (token === now.chosen) return;
  mark("chosen", now.chosen === null ? [] : [now.chosen], false);
  mark("attending", now.attending ?? [], false);
  now.chosen = token;
  now.attending = strongestAt(token).map((one) => one.query);
  mark("chosen", [token], true);
  mark("attending", now.attending, true);
  inspect();
}

function mark(name, tokens, on) {
  for (const policy of policies) for (const token of tokens) policy.spans[token].classList.toggle(name, on);
}

function strongestAt(token) {
  const size = about.strongest[0] + about.strongest[1];
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
  const hint = now.held ? "Press Esc to choose another." : "Click it, or press Enter, to keep it chosen.";
  const details = make("p", { class: "note" }, `Read at ${count(token + 1)}${id}. ${hint}`);
  $("chosen").replaceChildren(
    title,
    details,
    fateTable(token),
    drawLife(token),
    lifeNote(),
    ...strongestTable(token),
    byHead(token, open),
  );
}

function fateTable(token) {
  const fates = policies.map((policy) => fate(policy, token));
  const time = (at) => (at === undefined ? "never" : `at ${count(at)}`);
  const [one, of] = [now.heads, ` of ${now.heads}`];
  const rows = [
    [
      `held now, of ${one} head${one === 1 ? "" : "s"}`,
      (_, policy) => (token < now.time ? count(heldBy(policy, token)) : "not read yet"),
    ],
    ["first eviction", ({ times }) => time(times[0])],
    ["half have evicted it", ({ times }) => time(times[Math.ceil(one / 2) - 1])],
    ["last eviction", ({ times }) => time(times.at(-1))],
    ["never evicted in", ({ times }) => `${one - times.length}${of}`],
    ["evicted, important again later in", ({ again }) => `${again}${of}`],
  ];
  if (fates.some(({ lost }) => lost)) rows.push(["lost for lack of a slot in", ({ lost }) => `${lost}${of}`]);
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

// How many of the visible heads hold the token, over time, and the queries that attend to it most below.
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
  const strongest = strongestAt(token);
  const most = Math.max(...strongest.map((one) => one.attention));
  for (const { query, attention } of strongest) {
    const x = 1000 * across(query + 1);
    svg.append(draw("line", { class: "query", x1: x, x2: x, y1: 100, y2: 98 - (22 * attention) / most }));
  }
  const line = draw("line", { class: "now", y1: 0, y2: 100 });
  moveCursor(line, now.time);
  svg.append(line);
  return svg;
}

function lifeNote() {
  const all = now.heads === 1 ? "one" : `all ${now.heads}`;
  const text =
    `Above: heads that hold the key, from ${all} (top) to none, over the whole text. ` +
    "The strokes are the queries listed below; a longer one gave it more attention.";
  return make("p", { class: "note" }, text);
}

function strongestTable(token) {
  const strongest = strongestAt(token);
  const title = make("h3", {}, "Queries that attend to it most, with the full cache");
  if (!strongest.length) return [title, make("p", { class: "note" }, "No later query attends to it.")];
  const table = make("table", { class: "strongest" });
  const columns = [
    "token",
    "",
    "later by",
    "layer",
    "head",
    "attention",
    ...policies.map((policy) => (policies.length > 1 ? nameOf(policy) : "key")),
  ];
  table.append(make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name))));
  for (const { query, head, attention } of strongest) {
    const row = [
      count(query),
      word(query),
      count(query - token),
      about.layers[Math.floor(head / about.heads)],
      head % about.heads,
      percent(attention),
    ];
    const cells = row.map((text, index) => make("td", index === 1 ? { class: "word" } : {}, `${text}`));
    for (const policy of policies) {
      const there = policy.until[head * about.tokens + token] > query;
      cells.push(
        make("td", there ? {} : { class: "missed" }, there ? "held" : count(policy.gone[head * about.tokens + token])),
      );
    }
    table.append(make("tr", {}, ...cells));
  }
  const last = policies.length > 1 ? "The last columns say" : "The last column says";
  return [
    title,
    table,
    make(
      "p",
      { class: "note" },
      `${last} whether that head held the key when the query was read, or when it had been evicted.`,
    ),
  ];
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
        return make(
          "td",
          again ? { class: "again" } : {},
          policy.gone[at] === NEVER ? "–" : count(policy.gone[at]) + (again ? "*" : ""),
        );
      });
      table.append(make("tr", {}, make("th", { scope: "row" }, `${number}`), ...cells));
    });
    return [
      make("h3", {}, policy.spec),
      table,
      make("p", { class: "note" }, "–: never. *: a later query would have found it important."),
    ];
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
