"""The command line, in one process, on a tiny model that the tests make."""

import contextlib
import json
import re
from importlib.metadata import EntryPoint

import click
import jax
import numpy as np
import pytest

from corm_jax.command import cli, compare, inputs
from corm_jax.runs import recording
from corm_jax.traces.trace import Trace
from tests.test_checkpoint import TEXT, byte_level_tokenizer

KEYS = "policy nll ppl delta_nll kept_final kept_mean kv_bytes_full kv_bytes_live kv_bytes_allocated overflow passes"


@pytest.fixture
def corm(run_main):
    return lambda *arguments: run_main(cli.main, "corm", *arguments)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 9, encoding="utf-8")
    return path


def test_compare(corm, model, text, tmp_path):
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    code, out, _ = corm(
        *("compare", "--model", model, "--text", text, "--tokens", 100, "--json", report, "--plot", plot),
        *("--policy", "full", "--policy", "corm:window=8,recent=4"),
    )
    assert code == 0
    assert "corm:window=8,recent=4" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = json.loads(report.read_text())
    assert {"model", "text", "tokens", "dtype", "device", "rows"} <= result.keys()
    full, evicting = result["rows"]
    assert " 0.0366 " in out  # MiB of the full cache, which one decimal would round to 0
    assert set(full) == {*KEYS.split(), "seconds", "kept_per_layer", "budget"}
    per_layer = 2 * 2 * 8 * 4 * 100  # k and v, 2 heads of 8 float32 numbers, 100 tokens
    assert full["kv_bytes_full"] == full["kv_bytes_live"] == 3 * per_layer
    assert full["kept_final"] == full["kept_mean"] == 1
    assert full["delta_nll"] == 0
    assert evicting["kv_bytes_live"] == round(evicting["kept_final"] * full["kv_bytes_full"])
    assert 0 < evicting["kept_final"] < 1
    assert len(evicting["kept_per_layer"]) == 3
    assert sum(evicting["kept_per_layer"]) / 3 == pytest.approx(evicting["kept_final"])


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["20", "0.2"])
def test_a_budget_holds_all_to_the_same_memory(corm, model, text, tmp_path, budget):
    report, specs = (
        tmp_path / "report.json",
        ("full", "h2o", "tova:sinks=1", "corm:window=30,recent=4", "corm:group=mean", "scissorhands"),
    )
    policies = (item for spec in specs for item in ("--policy", spec))
    code, out, _ = corm(
        *("compare", "--model", model, "--text", text, "--tokens", 100, "--json", report, "--budget", budget, *policies)
    )
    assert code == 0
    assert "searched" in out
    full, *rows = json.loads(report.read_text())["rows"]
    searched = rows.pop(3)
    assert re.fullmatch(r"corm:group=mean,window=(\d+),recent=\1", searched["policy"])
    assert searched["kept_final"] == pytest.approx(0.2, rel=0.25)  # a step of one in a small window is large
    assert [row["budget"] for row in (full, searched, *rows)] == ["none", "searched", "fixed", "fixed", "cap", "fixed"]
    assert [row["policy"] for row in rows] == [
        "h2o:recent=10,budget=20",
        "tova:sinks=1,budget=20",
        "corm:window=30,recent=4,budget=20",
        "scissorhands:budget=20",
    ]
    assert full["kept_final"] == 1
    for row in rows[:3]:
        assert row["kept_final"] == pytest.approx(0.2)
        assert row["overflow"] == 0
        # 21 slots instead of 100: the budget and the token that is read, with a position and some state each.
        assert row["kv_bytes_allocated"] < 0.25 * full["kv_bytes_allocated"]
    assert 0.1 <= rows[3]["kept_final"] <= 0.2  # drops half of the budget at a time


def test_only_what_follows_the_prompt_is_scored(corm, model, text, tmp_path):
    report, common = tmp_path / "report.json", ("compare", "--model", model, "--text", text, "--tokens", 100)
    code, out, _ = corm(
        *common, "--prompt", 60, "--policy", "full", "--policy", "snapkv:budget=12,window=4", "--json", report
    )
    assert (code, "over 40 predictions" in out) == (0, True)
    _, snap = json.loads(report.read_text())["rows"]
    assert snap["kept_final"] == pytest.approx((12 + 40) / 100)
    assert 0 < abs(snap["delta_nll"]) < 1
    for prompt, message in (
        (0, "'--prompt': '0' is not a whole number from 1"),
        (100, "--policy snapkv, --prompt 100: a prompt of 100 tokens does not end within a text of 99"),
    ):
        code, _, err = corm(*common, "--prompt", prompt, "--policy", "snapkv")
        assert (code, message in err) == (2, True), err
    code, _, err = corm(*common, "--policy", "full", "--policy", "corm:oneshot=true")
    assert code == 2
    assert (
        "--policy corm:oneshot=true waits for the end of the prompt: say how many of the tokens are the prompt" in err
    )
    assert "with --prompt" in err


def test_compare_reads_python_s_own_reference_by_default(corm, model):
    code, out, _ = corm("compare", "--model", model, "--tokens", 40, "--policy", "full", "--chunk", 8)
    assert code == 0
    assert "pydoc_data.topics" in out


def test_overflow_is_shown(corm, model, text):
    arguments = ("compare", "--model", model, "--text", text, "--tokens", 100, "--policy", "full", "--capacity", 60)
    code, out, _ = corm(*arguments)
    assert code == 0
    assert f" {40 * 3 * 2} " in out
    code, _, err = corm(*arguments, "--overflow", "error")
    assert (code, "ran out of its 60 slots" in err) == (2, True)


def test_going_beyond_the_trained_context_is_noted(corm, model, text):
    code, _, err = corm("compare", "--model", model, "--text", text, "--tokens", 280, "--policy", "full", "--chunk", 70)
    assert code == 0
    assert "280 tokens go beyond the 256 that the model was trained on" in err


def test_a_policy_that_cannot_work_stops_all_before_any_is_read(corm, model, monkeypatch):
    monkeypatch.setattr(compare, "read_text", lambda *_, **__: pytest.fail("a text was read"))
    code, _, err = corm("compare", "--model", model, "--capacity", 20, "--policy", "full", "--policy", "corm")
    assert (code, "cannot hold the keys that the policy never evicts" in err) == (2, True)


def test_generate(corm, model, tmp_path):
    (tmp_path / "prompt").write_text("It was the")
    common = ("generate", "--model", model, "--max-new-tokens", 20, "--policy", "corm:window=4,recent=2")
    code, out, _ = corm(*common, "--prompt", "It was the")
    assert code == 0
    assert re.match(
        r"\[cache: \d+\.\d of \d+ keys live in a head \(mean over layers and heads\), ", out.splitlines()[-1]
    )
    assert corm(*common, "--prompt-file", tmp_path / "prompt")[1] == out
    assert corm(*common, "--prompt", "It was the", "--chat")[1] != out
    assert corm(*common, "--prompt", "It was the", "--temperature", 1, "--top-p", 0.9, "--seed", 2)[0] == 0
    assert corm(*common[:-1], "snapkv:budget=4,window=2", "--prompt", "It was the" * 9)[0] == 0


def test_the_bar_says_what_is_read(monkeypatch, model):
    descriptions = []

    class Bar(contextlib.nullcontext):
        def __enter__(self):
            return self

        def track(self, items, description):
            descriptions.append(description)
            return items

    monkeypatch.setattr(inputs, "progress_bar", Bar)
    inputs.load(model, "float32")
    assert descriptions == [f"reading the weights of {model}, tensor by tensor"]


def test_record(corm, model, text, tmp_path):
    out = tmp_path / "its trace"
    common = ("record", "--model", model, "--text", text, "--tokens", 70)
    code, printed, _ = corm(*common, "--out", out)
    assert code == 0
    trace = Trace.open(out)
    assert trace.meta.shapes == {"q": (70, 6, 8), "k": (70, 2, 8), "v": (70, 2, 8)}
    assert (trace.meta.layers, trace.meta.model, trace.meta.dtype) == (3, model, "float32")
    tokenizer = byte_level_tokenizer()
    assert list(trace.meta.tokens) == tokenizer.encode(text.read_text()).ids[:70]
    assert "".join(trace.meta.pieces).startswith("It was the best of times, it was the worst of times. 'It's na")
    first, *commands = printed.splitlines()
    size = sum(file.stat().st_size for file in out.iterdir()) / 2**20
    assert first == f"{out}: 3 layers of 70 tokens, {size:.3g} MiB. To replay a policy on it, or to see it:"
    spec = "corm:window=8,recent=8"  # which evicts something in 70 tokens
    assert commands == [f"{line} '{out}' --policy {spec}" for line in ("python -m simulator replay", "corm view")]
    assert corm(*common, "--out", tmp_path / "half", "--store", "float16")[0] == 0
    half = Trace.open(tmp_path / "half")
    np.testing.assert_allclose(half.layer(2).q, trace.layer(2).q, rtol=1e-3, atol=1e-6)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms rely on it
        assert corm(*common, "--out", tmp_path / "brain", "--dtype", "bfloat16")[0] == 0
    brain = Trace.open(tmp_path / "brain")
    assert brain.meta.model == f"{model} (bfloat16)"
    assert 0 < np.abs(brain.layer(0).k - trace.layer(0).k).max() < 0.1


def test_an_interrupted_recording_goes_on(corm, model, text, tmp_path, monkeypatch):
    common = ("record", "--model", model, "--text", text, "--tokens", 30, "--out")
    assert corm(*common, tmp_path / "whole")[0] == 0
    layer, calls = recording._layer, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return layer(*arguments)

    monkeypatch.setattr(recording, "_layer", interrupted)
    code, _, err = corm(*common, tmp_path / "cut")
    assert (code, "interrupted" in err, (tmp_path / "cut").exists()) == (130, True, False)
    code, _, err = corm(*common, tmp_path / "cut")
    assert (code, "2 of 3 layers were recorded before" in err, len(calls)) == (0, True, 4)
    whole, cut = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "cut"))
    assert cut == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "text.txt", "whole"]
    calls.clear()
    assert corm(*common, tmp_path / "other")[0] == 130
    assert "were recorded before" not in corm(*common, tmp_path / "other", "--store", "bfloat16")[2]
    assert Trace.open(tmp_path / "other").meta.dtype == "bfloat16"


def test_a_budget_below_what_is_protected_stops_all(corm, model, text):
    code, _, err = corm("compare", "--model", model, "--text", text, "--budget", 20)
    assert (code, err.count("\n")) == (2, 1)
    assert "a budget of 20 keys is below the 256 that the policy never evicts" in err
    code, _, err = corm("compare", "--model", model, "--text", text, "--budget", "1.5")
    assert "a budget must be a whole number of keys from 1 up, or a share in (0, 1], not 1.5" in err


def test_policies_are_listed(corm):
    _, out, _ = corm("policies")
    for word in ("full", "corm", "window", "recent", "position | live", "any | mean", "256"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--policy", "corm:window=0"], "window must be a whole number from 1"),
        (["compare", "--policy", "h3o"], "unknown policy 'h3o'"),
        (["compare", "--text", "{empty}"], "is empty"),
        (["compare", "--text", "{none}"], "cannot read"),
        (["compare", "--text", "{binary}"], "is not UTF-8 text"),
        (["compare", "--text", "{text}", "--tokens", "99999"], "tokens; 99,999 were asked for"),
        (["compare", "--text", "{text}", "--tokens", "1"], "'--tokens': '1' is not a whole number from 2"),
        (
            ["compare", "--tokens", "50", "--capacity", "20"],
            "cannot hold the keys that the policy never evicts, such as its recent ones (256 keys)",
        ),
        (["compare", "--text", "{text}", "--tokens", "-5"], "'--tokens': '-5' is not a whole number from 2"),
        (["compare", "--tokens", "50", "--chunk", "0"], "'--chunk': '0' is not a whole number from 1"),
        (["compare", "--tokens", "50", "--capacity", "0"], "'--capacity': '0' is not a whole number from 1"),
        (["compare", "--json", "{none}/report.json"], "there is no directory"),
        (["compare", "--plot", "{directory}"], "it is a directory"),
        (["compare", "--dtype", "float16"], "'float16' is not one of 'float32', 'bfloat16'"),
        (["compare", "--depth", "3"], "No such option"),
        (["generate", "--chat"], "give a prompt"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "give a prompt"),
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--prompt", "a", "--temperature", "-1"], "'--temperature': '-1' is not a number from 0"),
        (["generate", "--prompt", "a", "--model", "nothing"], "unknown model 'nothing'"),
        (["record", "--tokens", "9"], "Missing option '--out'"),
        (["record", "--out", "{none}", "--tokens", "0"], "'--tokens': '0' is not a whole number from 1"),
        (["record", "--out", "{none}", "--text", "{text}", "--tokens", "99999"], "tokens; 99,999 were asked for"),
        (["record", "--out", "{none}", "--text", "{empty}"], "is empty"),
        (["record", "--out", "{none}", "--store", "int8"], "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        (["record", "--out", "{none}", "--model", "nothing"], "unknown model 'nothing'"),
        (["record", "--out", "{directory}", "--model", "nothing"], "exists already"),
        (["record", "--out", "{empty}", "--model", "nothing"], "exists already"),
        (["record", "--out", "{none}/trace", "--model", "nothing"], "there is no directory"),
        (["record", "--out", "{long}", "--model", "nothing"], "File name too long"),
        (["fly"], "No such command 'fly'"),
    ],
)
def test_mistakes_end_in_one_line(corm, model, text, tmp_path, arguments, message):
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xd8")
    places = {name: tmp_path / name for name in ("empty", "none", "binary")}
    places["long"] = tmp_path / ("x" * 300)
    arguments = [part.format(text=text, directory=tmp_path, **places) for part in arguments]
    if "--model" not in arguments and len(arguments) > 1:
        arguments += ["--model", model]
    code, _, err = corm(*arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("corm: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_plan_from_a_trace_to_its_use(corm, run_main, model, text, tmp_path):
    """Record, plan, compare: the pools hold the policy of the plan, and another gets all that it wants."""
    from simulator.cli import main as simulator

    trace, plan, report = tmp_path / "trace", tmp_path / "plan.json", tmp_path / "report.json"
    spec, common = "corm:window=8,recent=4", ("--model", model, "--text", text, "--tokens", 96)
    assert corm("record", *common, "--out", trace)[0] == 0
    planning = ("plan", trace, "--policy", spec, "--chunk", 4, "--overflow", 0, "--out", plan)
    code, out, _ = run_main(simulator, "simulator", *planning)
    assert (code, "slots a head for 96 tokens" in out) == (0, True)
    pooled = ("--layout", "pooled", "--capacity", plan)
    compare = ("compare", *common, "--chunk", 4, "--policy", "full", "--policy", spec)
    assert corm(*compare, *pooled, "--json", report)[0] == 0
    full, small = json.loads(report.read_text())["rows"]
    assert corm(*compare, "--json", report, "--overwrite")[0] == 0
    _, large = json.loads(report.read_text())["rows"]
    assert small["kv_bytes_allocated"] < large["kv_bytes_allocated"] < 1.1 * full["kv_bytes_allocated"]
    assert small["overflow"] < 0.02 * 96 * 2 * 3  # a replay leaves out what evictions change in later layers' queries
    assert small["nll"] == pytest.approx(large["nll"], abs=0.01)
    code, out, _ = corm(
        *("generate", "--model", model, "--prompt", "a b", "--max-new-tokens", 3, "--chunk", 4, "--policy", spec),
        *pooled,
    )
    assert (code, "overflow 0" in out) == (0, True)
    for arguments, message in [
        ((*compare, "--capacity", plan), "is for pools: add --layout pooled"),
        (
            ("compare", *common, "--chunk", 4, "--policy", "full", *pooled),
            f"is for --policy {spec}, which is not among",
        ),
        (("compare", *common, "--policy", spec, *pooled), "is for --chunk 4, not 1"),
        (
            (*compare, "--layout", "pooled", "--capacity", tmp_path / "none"),
            "neither a number of slots nor the file of a",
        ),
        ((*compare, "--layout", "pooled", "--capacity", 3), "--policy full, --capacity: capacity 3 cannot hold"),
    ]:
        code, _, err = corm(*arguments)
        assert (code, message in err) == (2, True), err
    another = json.loads(plan.read_text())
    another["capacity"][1] = 0
    plan.write_text(json.dumps(another))
    code, _, err = corm(*compare, *pooled)
    assert (code, "slots a head of layer 1: must be from 1 to 2147483647, not 0" in err) == (2, True)
    another["capacity"] = [5, 5]
    plan.write_text(json.dumps(another))
    code, _, err = corm(*compare, *pooled)
    assert (code, "the plan is for 2 layers" in err) == (2, True)


@click.command()
def hello():
    """Greet."""
    print("hello")


HELLO = EntryPoint("hello", "tests.test_cli:hello", cli.GROUP)


def test_a_command_of_another_package(corm, monkeypatch):
    monkeypatch.setattr(cli.corm, "registered", [*cli.corm.registered, HELLO])
    assert corm("hello") == (0, "hello\n", "")
    assert re.search(r"^  generate  .*\n  hello +Greet\.$", corm("--help")[1], re.MULTILINE)


@pytest.mark.parametrize(
    ("registered", "message"),
    [
        ([], "no command is registered: run pip install for corm-jax once more"),
        ([HELLO, HELLO], "two commands are called 'hello', tests.test_cli:hello and tests.test_cli:hello: uninstall"),
        ([EntryPoint("hello", "nowhere:hello", cli.GROUP)], "'hello' cannot be imported from nowhere:hello: No module"),
        ([EntryPoint("hello", "tests.test_cli:bye", cli.GROUP)], "'hello' cannot be imported from tests.test_cli:bye"),
    ],
)
def test_commands_that_cannot_be_used(corm, monkeypatch, registered, message):
    monkeypatch.delitem(cli.corm.__dict__, "registered", raising=False)
    monkeypatch.setattr(cli, "entry_points", lambda group: registered)
    for argument in ("hello", "--help"):
        code, _, err = corm(argument)
        assert (code, err.count("\n"), message in err) == (2, 1, True), err
    cli.corm.__dict__.pop("registered", None)
