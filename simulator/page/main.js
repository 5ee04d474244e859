// Keyboard and pointer, and how the page begins.

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
    policy.pointed = event.target.closest("button");
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
    const [layer, head] = [button.dataset.layer, button.dataset.head].map((text) =>
      text === "null" ? null : Number(text),
    );
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
  else if (event.target === document.body && ["ArrowLeft", "ArrowRight"].includes(event.key))
    stepBy(event.key === "ArrowLeft" ? -1 : 1);
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

function plural(number, name) {
  return `${count(number)} ${name}${number === 1 ? "" : "s"}`;
}

function describe() {
  const { model, tokens, layers, heads, group, options, strongest, far } = about;
  const parts = [
    model.trim() || "a trace",
    `${plural(tokens, "token")}, ${plural(layers.length, "layer")} of ${plural(heads, "key-value head")}`,
    options.fidelity,
    options.chunk > 1 && `chunks of ${options.chunk}`,
    options.capacity && `${count(options.capacity)} slots a head`,
    options.prompt && `a prompt of ${count(options.prompt)}`,
  ];
  $("about").textContent = parts.filter(Boolean).join(" · ");
  const mean = group > 1 ? `, the mean of the ${group} query heads that share a key` : "";
  $("strongest-note").textContent =
    `Attention is that with the full cache${mean}. For each token this page holds the ${strongest[0]} queries less than ` +
    `${far} tokens later that attend to it most, and the ${strongest[1]} after those, each with the head in which it ` +
    "attends most. All other queries are left out, and so is the token's own.";
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
