"""``corm view``: the data in the page, and what the page shows of it in a browser."""

import base64
import hashlib
import json
import re
import shutil
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from corm_jax import CormError, parse
from corm_jax.command import cli
from corm_jax.traces.trace import Trace
from simulator import synthetic, viewer
from simulator.oracle import attention
from simulator.replay import replay

SPECS = ("corm:window=12,recent=4", "h2o:budget=20,recent=4")
CAPACITY = 24
HOSTILE = [
    "</script><script>window.hurt = 1</script>", "<img src=x onerror='window.hurt = 2'>", "<!--SCRIPT-->", "<!--",
    "&lt;b&gt;", "\u202e", "\x00", "\ufffd", "\n", "\r\n", " the", "\t", "猫", "", "${window.hurt = 3}", "\\u003c",
    "\u2028", "x" * 500,
]  # fmt: skip
MODEL = "<b>model</b>\n</title><script>window.hurt = 4</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("viewer")


@pytest.fixture(scope="module")
def trace(folder):
    """Four layers of 96 tokens, 4 query heads on 2 key-value heads, whose text must not be executed."""
    made = synthetic.topics(layers=4, steps=96, kv_heads=2, group=2, head_dim=8, length=16)
    q, k, v = (np.stack(arrays) for arrays in zip(*(made.layer(i) for i in range(4)), strict=True))
    pieces = [HOSTILE[i % len(HOSTILE)] for i in range(96)]
    Trace.from_qkv(q, k, v, scale=made.meta.scale, model=MODEL, tokens=[*range(96)], pieces=pieces).save(
        folder / "trace"
    )
    return folder / "trace"


@pytest.fixture(scope="module")
def replays(trace):
    return [replay(Trace.open(trace), parse(spec), capacity=CAPACITY, errors=False) for spec in SPECS]


@pytest.fixture
def corm(run_main):
    return lambda *arguments: run_main(cli.main, "corm", *arguments)


def view(corm, trace, out, *options, specs=SPECS):
    code, printed, err = corm("view", trace, *(f"--policy={spec}" for spec in specs), "--out", out, *options)
    assert (code, err) == (0, ""), err
    return out.read_text(encoding="utf-8"), printed


class Elements(HTMLParser):
    """The elements of a page, and the text in its scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.content, self.inside = [], [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.inside = dict(attrs).get("id", tag) if tag in ("script", "style", "title") else None

    def handle_data(self, data):
        if self.inside:
            self.content[self.inside] = self.content.get(self.inside, "") + data

    def handle_endtag(self, tag):
        self.inside = None


def data_of(page):
    """What is in a page: the object, and the arrays by name."""
    content = Elements(page).content
    about = json.loads(content["data"])
    raw = np.frombuffer(zlib.decompress(base64.b64decode(content["arrays"])), np.uint8).astype(np.uint16)
    numbers = raw[: len(raw) // 2] | raw[len(raw) // 2 :] << 8
    ends = np.cumsum([size for _, size in about["arrays"]])
    parts = np.split(numbers.astype(np.int32), ends[:-1])
    return about, {name: part for (name, _), part in zip(about["arrays"], parts, strict=True)}


def test_the_data_are_what_the_replay_keeps(corm, trace, replays, tmp_path):
    page, printed = view(corm, trace, tmp_path / "view.html", "--capacity", CAPACITY)
    assert "96 tokens, 4 layers, 24 slots a head, 0." in printed
    about, arrays = data_of(page)
    assert (about["policies"], about["layers"], about["heads"]) == ([*SPECS], [0, 1, 2, 3], 2)
    assert about["options"] == {"fidelity": "renormalized", "chunk": 1, "capacity": CAPACITY, "prompt": None}
    time = np.arange(1, 97)[:, None]
    for index, result in enumerate(replays):
        until, lost = (arrays[f"{name}{index}"].reshape(4, 2, 1, 96) for name in ("until", "lost"))
        gone = np.where(until == viewer.NONE, viewer.NONE, until + lost)  # as viewer.js reads it
        np.testing.assert_array_equal((np.arange(96) < time) & (time < gone), result.history())
        np.testing.assert_array_equal(arrays["needed"].reshape(4, 2, 96), result.needed)
    assert replays[0].overflow.sum() > 0


def test_the_queries_that_attend_most(corm, trace, tmp_path):
    _, arrays = data_of(view(corm, trace, tmp_path / "view.html")[0])
    heads = np.stack([alpha for layer in range(4) for alpha in attention(Trace.open(trace), layer)])
    near, far = viewer.NEAR_QUERIES, viewer.FAR_QUERIES
    query, head, share = (arrays[name].reshape(96, near + far) for name in ("query", "head", "attention"))
    for key in range(96):
        best = heads[:, :, key].max(0)
        for columns, queries in (
            (slice(near), range(key + 1, min(96, key + viewer.FAR))),
            (slice(near, None), range(key + viewer.FAR, 96)),
        ):
            expected = sorted((best[t] for t in queries), reverse=True)[: columns.stop or far]
            found = [t for t in query[key, columns] if t != viewer.NONE]
            assert len(found) == len(set(found)) == len(expected)
            assert set(found) <= set(queries)
            np.testing.assert_allclose(share[key, columns][: len(found)], 1e4 * np.array(expected), atol=0.51)
            which = head[key, columns][: len(found)]
            np.testing.assert_allclose(heads[which, found, key], best[found])


def test_hostile_text_stays_text(corm, trace, tmp_path):
    page, _ = view(corm, trace, tmp_path / "view.html")
    elements = Elements(page)
    assert (elements.names.count("script"), elements.names.count("img"), elements.names.count("b")) == (3, 0, 0)
    assert not [name for name in elements.attributes if name.startswith(("on", "src", "href"))]
    about, _ = data_of(page)
    shown = [piece if len(piece) <= viewer.PIECE else piece[: viewer.PIECE] + "…" for piece in HOSTILE]
    assert about["pieces"][: len(HOSTILE)] == shown
    assert about["left_out"] == ["Only the first 200 characters of 5 long tokens are shown."]
    assert about["model"] == MODEL
    # The policy lets nothing but the page's own style and script be used.
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(elements.content[name].encode()).digest()).decode()
        assert f"{name}-src &#x27;sha256-{digest}&#x27;" in page
    assert "default-src &#x27;none&#x27;" in page
    assert view(corm, trace, tmp_path / "again.html")[0] == page


def test_without_options(corm, trace, tmp_path, monkeypatch):
    """The page is view.html, and the policy has windows that fit the text."""
    monkeypatch.chdir(tmp_path)
    code, printed, _ = corm("view", trace)
    assert (code, printed.startswith("view.html: ")) == (0, True)
    about, _ = data_of((tmp_path / "view.html").read_text(encoding="utf-8"))
    assert about["policies"] == ["corm:window=12,recent=12"]
    code, _, err = corm("view", trace)
    assert (code, "--out view.html exists already: choose another name" in err) == (2, True)


def test_a_trace_without_text(corm, tmp_path):
    rows = np.tril(np.random.default_rng(0).random((1, 2, 40, 40)) ** 6)
    Trace.from_attention(rows / rows.sum(-1, keepdims=True), kv_heads=1).save(tmp_path / "rows")
    page, _ = view(corm, tmp_path / "rows", tmp_path / "view.html", "--tokens", 30, specs=SPECS[:1])
    about, arrays = data_of(page)
    assert (about["pieces"], about["positions"]) == (None, [*range(30)])
    assert about["left_out"] == [
        "Tokens 30 to 39 of the trace are left out.",
        "The trace holds no text: tokens are shown by their positions.",
    ]
    result = replay(Trace.open(tmp_path / "rows").part(steps=30), parse(SPECS[0]))
    np.testing.assert_array_equal(arrays["needed"], result.needed.ravel())
    assert view(corm, tmp_path / "rows", tmp_path / "one.html", "--tokens", 1, specs=["full"])


def test_what_is_left_out_of_a_large_trace(monkeypatch):
    trace = synthetic.noise(layers=9, steps=40, kv_heads=2, head_dim=2)
    monkeypatch.setattr(viewer, "TOKENS", 32)
    monkeypatch.setattr(viewer, "HEADS", 8)
    shown = viewer.part(trace)
    assert (shown.trace.meta.steps, shown.layers) == (32, [0, 3, 5, 8])
    assert shown.left_out == ["Tokens 32 to 39 of the trace are left out.", "Layers 1 to 2, 4, 6 to 7 are left out."]
    np.testing.assert_array_equal(shown.trace.layer(2).k, trace.layer(5).k[:32])
    assert viewer.part(trace, layers=list(range(9)), tokens=40).left_out == []
    monkeypatch.setattr(viewer, "MOST_NUMBERS", 100)
    assert viewer.part(trace).layers == [0]
    with pytest.raises(
        CormError, match=r"at most 100 keys, and 40 tokens in 2 layers of 2 heads have 160: lower --tok"
    ):
        viewer.part(trace, layers=[0, 8], tokens=40)
    with pytest.raises(CormError, match=r"at most 16,384 tokens, not 16,385: lower --tokens"):
        viewer.part(trace, tokens=16_385)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{trace}", "--out", "{old}"], "exists already: choose another name, delete it, or add --overwrite"),
        (["{trace}", "--out", "{none}/view.html"], "there is no directory"),
        (["{none}", "--out", "{new}"], "is no trace"),
        (["{trace}", "--out", "{new}", "--policy", "h3o"], "unknown policy 'h3o'"),
        (["{trace}", "--out", "{new}", "--policy", "snapkv"], "waits for the end of the prompt"),
        (
            ["{trace}", "--out", "{new}", "--policy", "streaming_llm:budget=20,positions=cache"],
            "a trace holds keys that are rotated already",
        ),
        (["{trace}", "--out", "{new}", "--capacity", "3"], "capacity 3 cannot hold"),
        (["{trace}", "--out", "{new}", "--layers", "0,4"], "layer must be a whole number from 0 to 3, not 4"),
        (["{trace}", "--out", "{new}", "--layers", "x"], "--layers must be numbers from 0 with commas between them"),
        (["{trace}", "--out", "{new}", "--tokens", "97"], "steps must be a whole number from 1 to 96, not 97"),
        (["{trace}", "--out", "{new}", *(f"--policy=random:budget={i}" for i in (20, 21, 22))], "at most two policies"),
    ],
)
def test_mistakes_end_in_one_line_before_any_work(corm, trace, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("simulator.replay._compiled", lambda *_, **__: pytest.fail("a layer was replayed"))
    (tmp_path / "old").write_text("mine")
    places = {name: tmp_path / name for name in ("old", "new", "none")}
    code, _, err = corm("view", *(part.format(trace=trace, **places) for part in arguments))
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert [(tmp_path / "old").read_text(), *tmp_path.iterdir()] == ["mine", tmp_path / "old"]


# In a browser ---------------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
HELD = """() => [...document.querySelectorAll('.panel')].map(panel =>
    [...panel.querySelectorAll('.text .token')].map(token => {
        if (token.classList.contains('future')) return -1;
        if (token.classList.contains('none')) return 0;
        return Number(getComputedStyle(token).getPropertyValue('--held'));
    }))"""
SHARES = """() => [...document.querySelectorAll('.panel')].map(panel =>
    [...panel.querySelectorAll('.map td button')].map(cell => Number(cell.style.getPropertyValue('--percent'))))"""
LIGHTNESS = """() => [...document.querySelectorAll('.panel .text .token:not(.future):not(.none)')].map(token =>
    [Number(token.style.getPropertyValue('--held')), getComputedStyle(token).backgroundColor])"""
SETTLED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with sync.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture(scope="module")
def file(trace, replays, folder):
    """The page of both policies."""
    shown = viewer.part(Trace.open(trace))
    options = {"fidelity": "renormalized", "capacity": CAPACITY, "chunk": 1, "prompt": None}
    page = viewer.page(shown, dict(zip(SPECS, replays, strict=True)), viewer.strongest(shown.trace), options)
    (folder / "view.html").write_text(page, encoding="utf-8")
    return folder / "view.html"


@pytest.fixture
def opened(browser, file):
    """Opens the page without a network; afterwards nothing may have been asked for or complained of."""
    noticed, contexts = [], []

    def open_page(scheme="light"):
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1300, "height": 800}, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noticed.append(message.text))
        page.on("pageerror", lambda error: noticed.append(str(error)))
        page.on("dialog", lambda dialog: noticed.append(dialog.message))
        page.on("request", lambda request: noticed.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-ready]")
        assert set(noticed) == {file.as_uri()}
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.hurt") is None
        context.close()
    assert set(noticed) == {file.as_uri()}


def go_to(page, time):
    page.evaluate(
        "time => { const slider = document.getElementById('time'); slider.value = time;"
        " slider.dispatchEvent(new Event('input')) }",
        time,
    )
    page.evaluate(SETTLED)


def held(result, time, heads=np.s_[:, :]):
    """How many of the heads hold each token, -1 before it is read."""
    chosen = result.history()[heads][..., time - 1, :].reshape(-1, result.steps)
    return np.where(np.arange(result.steps) < time, chosen.sum(0), -1).tolist()


def clock(page):
    return int(page.locator("#clock").inner_text().split(" ")[0])


@pytest.mark.slow
def test_a_time_of_the_slider_shows_what_the_replay_keeps(opened, replays):
    page = opened()
    for time in (96, 1, 2, 95, 40, 41, 64, 13, 12, 96):  # forward and back, near and far
        go_to(page, time)
        assert page.evaluate(HELD) == [held(result, time) for result in replays]
        for shares, result in zip(page.evaluate(SHARES), replays, strict=True):
            cells = 100 * result.live[..., time - 1].T.ravel() / time  # a row for each head
            np.testing.assert_allclose(shares, cells, atol=0.5)
        sums = [sum(max(0, one) for one in held(result, time)) for result in replays]
        for text, kept in zip(page.locator(".summary").all_inner_texts(), sums, strict=True):
            assert f"kept in all 8 heads: {kept:,} of {8 * time:,} keys" in text


@pytest.mark.slow
def test_one_head_or_layer_by_a_click(opened, replays):
    page = opened()
    go_to(page, 60)
    panel = page.locator(".panel").first
    panel.locator(".map td button").nth(4 + 2).click()  # head 1 of layer 2
    assert page.evaluate(HELD) == [held(result, 60, np.s_[2:3, 1:2]) for result in replays]
    go_to(page, 80)
    assert page.evaluate(HELD) == [held(result, 80, np.s_[2:3, 1:2]) for result in replays]
    panel.get_by_label("layer 3", exact=True).click()
    assert page.evaluate(HELD) == [held(result, 80, np.s_[3:4, :]) for result in replays]
    panel.get_by_label("head 0 of every layer").click()
    assert page.evaluate(HELD) == [held(result, 80, np.s_[:, 0:1]) for result in replays]
    page.keyboard.press("Escape")
    assert page.evaluate(HELD) == [held(result, 80) for result in replays]


@pytest.mark.slow
def test_the_keyboard(opened, replays):
    page = opened()
    keys = [("Home", 1), ("ArrowRight", 2), (".", 3), (">", 67), ("<", 3), (",", 2), ("End", 96), ("ArrowLeft", 95)]
    for key, time in keys:
        page.keyboard.press(key)
        page.evaluate(SETTLED)
        assert clock(page) == time
    assert page.evaluate(HELD) == [held(result, 95) for result in replays]
    page.keyboard.press("Home")
    page.keyboard.press("Space")
    for _ in range(100):  # the page forbids the strings of code that Playwright's own waiting needs
        if clock(page) > 3:
            break
        page.wait_for_timeout(100)
    assert 3 < clock(page) < 96, page.evaluate("JSON.stringify([now, frame])")
    assert page.locator("#play").inner_text() == "Pause"
    page.keyboard.press("Space")
    stopped = clock(page)
    page.wait_for_timeout(500)  # six queries, were it not for the pause
    assert (clock(page), page.locator("#play").inner_text()) == (stopped, "Play")
    assert page.evaluate(HELD) == [held(result, stopped) for result in replays]
    page.locator(".text").first.focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.locator("#chosen h2").inner_text().startswith("Token 2")
    page.locator(".map td button").first.focus()
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    assert page.evaluate(HELD) == [held(result, stopped, np.s_[1:2, 1:2]) for result in replays]


@pytest.mark.slow
def test_the_token_under_the_pointer(opened, replays):
    page = opened()
    go_to(page, 70)
    for token in (0, 16, 33, 50):
        page.locator(f".text .token[data-token='{token}']").first.hover()
        assert page.locator("#chosen h2").inner_text().startswith(f"Token {token}")
        rows = [row.split("\t") for row in page.locator("#chosen .numbers").inner_text().split("\n")[1:]]
        found = {name: cells for name, *cells in rows}
        for index, result in enumerate(replays):
            gone = np.sort(result.gone[..., token].ravel())
            went = [int(time) for time in gone if time <= 96]
            again = int((result.regretted & (result.gone <= 96))[..., token].sum())
            column = {name: cells[index] for name, cells in found.items()}
            assert column == {
                "held now, of 8 heads": str(held(result, 70)[token]),
                "first eviction": f"at {went[0]}" if went else "never",
                "half have evicted it": f"at {went[3]}" if len(went) > 3 else "never",
                "last eviction": f"at {went[-1]}" if went else "never",
                "never evicted in": f"{8 - len(went)} of 8",
                "evicted, important again later in": f"{again} of 8",
                "lost for lack of a slot in": f"{int(result.lost[..., token].sum())} of 8",
            }
        if token == 0:
            page.locator("#chosen summary").click()
        page.wait_for_selector(".by-head")
        for table, result in zip(page.locator(".by-head").all(), replays, strict=True):
            cells = re.findall(r"[\d\u2013]+\*?", " ".join(table.locator("td").all_inner_texts()))
            times = result.gone[..., token].ravel().tolist()
            assert [cell.rstrip("*") for cell in cells] == [str(time) if time <= 96 else "\u2013" for time in times]
            assert ["*" in cell for cell in cells] == (result.regretted & (result.gone <= 96))[
                ..., token
            ].ravel().tolist()
    strongest = page.locator(".strongest tr").all()[1:]
    listed = {int(row.locator("td").first.inner_text()) for row in strongest}
    marked = (
        page.locator(".panel").first.locator(".attending").evaluate_all("all => all.map(one => +one.dataset.token)")
    )
    assert set(marked) == listed
    for row in strongest:
        query, _, later, layer, head, _, *fates = row.locator("td").all_inner_texts()
        assert int(query) - int(later) == 50
        for text, result in zip(fates, replays, strict=True):
            there = result.until[int(layer), int(head), 50] > int(query)
            assert text == ("held" if there else str(result.gone[int(layer), int(head), 50]))


@pytest.mark.slow
def test_colours_follow_the_number_of_heads_in_both_schemes(opened):
    found = {}
    for scheme in ("light", "dark"):
        page = opened(scheme)
        go_to(page, 60)
        shown = {number: float(re.search(r"[\d.]+", colour)[0]) for number, colour in page.evaluate(LIGHTNESS)}
        levels = [shown[number] for number in sorted(shown)]  # Oklab's lightness
        assert len(shown) > 4
        assert levels == sorted(levels, reverse=scheme == "light")
        assert len(set(levels)) == len(levels)
        found[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor"), levels
    assert found["light"][0] != found["dark"][0]
    assert min(found["light"][1]) > max(found["dark"][1])


@pytest.mark.slow
def test_hostile_text_is_shown(opened):
    page = opened()
    texts = page.locator(".panel").first.locator(".text .token").all_text_contents()
    assert texts[:4] == HOSTILE[:4]
    assert texts[5:13] == ["\\u{202e}", "\\u{0}", "\ufffd", "⏎\n", "␍⏎\n", " the", "⇥\t", "猫"]
    assert page.title().startswith("<b>model</b> </title><script>")
    assert Path(page.url.removeprefix("file://")).name == "view.html"
