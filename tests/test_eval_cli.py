"""``corm eval`` on a tiny model: what it writes, how it goes on after a kill, what it refuses."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers, trainers
from transformers import LlamaForCausalLM

from corm_jax.command import cli
from corm_jax.evaluation import recall
from corm_jax.evaluation.records import CONFIG, RESULTS
from corm_jax.model.tokenizer import Tokenizer
from tests.test_checkpoint import TEXT
from tests.test_texts import byte_level

KILLS = 3
TRAINING = {
    "vocab_size": 400,
    "special_tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
    "show_progress": False,
}
POLICIES = ("--policy", "full", "--policy", "corm:window=8,recent=4")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 30, encoding="utf-8")
    return path


@pytest.fixture
def evaluate(run_main, model):
    return lambda kind, *arguments: run_main(cli.main, "corm", "eval", kind, "--model", model, *arguments)


def rows(folder):
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def test_perplexity(evaluate, text, tmp_path):
    out = tmp_path / "out"
    arguments = "--text", text, "--tokens", 64, "--bucket", 32, "--limit", 3, "--out", out, *POLICIES
    code, printed, _ = evaluate("perplexity", *arguments)
    assert code == 0
    assert "nll - full" in printed
    found = rows(out)
    assert [row["example"] for row in found[::2]] == [f"text.txt/{start}" for start in (0, 64, 128)]
    assert len(found[0]["nll_by_position"]) == 2
    assert found[0]["live_bytes"] > found[1]["live_bytes"]
    config = json.loads((out / CONFIG).read_text())
    assert config["versions"].keys() >= {"jax", "corm-jax"}
    assert len(config["data"]["text.txt"]) == 16
    before = (out / RESULTS).read_bytes()
    code, again, err = evaluate("perplexity", *arguments)
    assert (code, again) == (0, printed)
    assert "6 results of an earlier run are kept" in err
    assert (out / RESULTS).read_bytes() == before
    code, _, err = evaluate("perplexity", *arguments[:-2], "--policy", "tova:budget=8")
    assert code == 2
    assert "holds results of another configuration (policies differs" in err


def test_agreement(evaluate, text, tmp_path):
    arguments = "--text", text, "--tokens", 64, "--limit", 2, "--budget", "0.25", "--policy", "full"
    code, _, _ = evaluate("agreement", *arguments, "--policy", "snapkv:window=4", "--out", tmp_path / "out")
    assert code == 0
    full, snapkv, *_ = rows(tmp_path / "out")
    assert full["kl"] == pytest.approx(0, abs=1e-6)
    assert full["same"] == 1
    assert snapkv["ran"] == "snapkv:window=4,budget=16"
    assert snapkv["kl"] > 0


@pytest.mark.slow
def test_recall(evaluate, text, tmp_path):
    out = tmp_path / "out"
    arguments = "--text", text, "--length", 256, "--depth", 0.5, "--limit", 1, "--budget", 0.25, "--out", out
    tasks = "--task", "pairs", "--task", "repeat"
    policies = [part for spec in ("full", "corm") for part in ("--policy", spec)]
    code, printed, _ = evaluate("recall", *arguments, *tasks, *policies)
    assert code == 0
    whole = (out / RESULTS).read_bytes()
    (out / RESULTS).write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert evaluate("recall", *arguments, *tasks, *policies)[0] == 0
    assert (out / RESULTS).read_bytes() == whole  # CORM's window too is the same, though searched again
    assert "margin" in printed
    found = {(row["task"], row["policy"]): row for row in rows(tmp_path / "out")}
    assert len(found) == 4
    assert found["pairs", "corm"]["ran"] == found["repeat", "corm"]["ran"]
    assert found["pairs", "full"].keys() >= {"nll", "margin", "exact", "answer", "kept", "allocated_bytes"}
    assert "exact" not in found["repeat", "full"]
    assert found["repeat", "corm"]["kept"] < 0.5


def test_longbench(evaluate, data, tmp_path):
    arguments = "--data", data, "--length", 128, "--limit", 2, "--out", tmp_path / "out", "--chat", *POLICIES
    code, printed, _ = evaluate("longbench", *arguments)
    assert code == 0
    assert "score - full" in printed
    assert [row["example"] for row in rows(tmp_path / "out")[::2]] == ["qasper/0", "qasper/1", "trec/0"]
    assert all(0 <= row["score"] <= 1 for row in rows(tmp_path / "out"))


def test_report(run_main, evaluate, data, text, tmp_path):
    grid = [f"corm:window={w},recent={r}" for w in (8, 16) for r in (4, 8)]
    specs = [part for spec in ("full", *grid) for part in ("--policy", spec)]
    evaluate("perplexity", "--text", text, "--tokens", 64, "--limit", 2, "--out", tmp_path / "texts", *specs)
    evaluate("longbench", "--data", data, "--length", 128, "--limit", 2, "--out", tmp_path / "bench", *POLICIES)
    page = tmp_path / "page.md"
    code, printed, _ = run_main(cli.main, "corm", "report", tmp_path / "texts", tmp_path / "bench", "--out", page)
    assert (code, printed.strip()) == (0, str(page))
    words = page.read_text()
    assert "| w | r = 4 | r = 8 |" in words
    assert "text.txt, nll minus that of full by w" in words
    assert "| all tasks | `full` | 3 |" in words
    code, _, _ = run_main(cli.main, "corm", "report", tmp_path / "bench", "--against", POLICIES[-1], "--out", page)
    assert code == 2
    code, _, _ = run_main(
        cli.main, "corm", "report", tmp_path / "bench", "--against", POLICIES[-1], "--out", page, "--overwrite"
    )
    assert code == 0
    assert f"score - {POLICIES[-1]} |" in page.read_text()
    code, _, err = run_main(cli.main, "corm", "report", tmp_path / "bench", "--against", "tova", "--out", page)
    assert (code, f"'tova' is none of the policies that ran: choose from full, {POLICIES[-1]}" in err) == (2, True)
    assert "`qasper/0`:" in words
    assert words.count("| `corm:window=8,recent=4` |") >= 3
    assert all((tmp_path / f"page-{kind}.png").exists() for kind in ("perplexity", "longbench"))
    (tmp_path / "bench" / RESULTS).write_text("")
    code, _, err = run_main(cli.main, "corm", "report", tmp_path / "bench", "--out", page)
    assert (code, "has no results yet: run corm eval longbench first" in err) == (2, True)
    code, _, err = run_main(cli.main, "corm", "report", tmp_path, "--out", page)
    assert (code, "is no result directory of corm eval" in err) == (2, True)


def test_analyse(run_main, model, text, tmp_path):
    out, other = tmp_path / "analysis.json", tmp_path / "other.txt"
    other.write_text(Path(text).read_text()[500:])
    texts = "--text", text, "--text", other
    code, printed, _ = run_main(cli.main, "corm", "analyse", "--model", model, *texts, "--tokens", 200, "--out", out)
    assert code == 0
    found = [one["similarity"] for one in json.loads(out.read_text())["texts"].values()]
    means = np.mean([[layer[0] for layer in layers] for layers in found], axis=1)
    assert len(found[0]) == 3
    assert f"{means.mean():.3f} [{means.min():.3f}, {means.max():.3f}]" in re.sub(r"\s+", " ", printed)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for arguments, message in (
        (("--tokens", 100), "'--tokens': '100' is not a whole number from 128"),
        (("--tokens", -200), "'--tokens': '-200' is not a whole number from 128"),
        (("--out", tmp_path / "x.png"), "name the same file"),
        (("--tokens", 10**9), "1,000,000,000 were asked for"),
    ):
        common = "--model", model, *texts, "--out", out, "--overwrite"
        code, _, err = run_main(cli.main, "corm", "analyse", *common, *arguments)
        assert (code, err.count("\n"), message in err) == (2, 1, True), err


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("perplexity", ["--policy", "nothing"], "unknown policy 'nothing'"),
        ("perplexity", ["--policy", "full", "--tokens", "1"], "'--tokens': '1' is not a whole number from 2"),
        ("perplexity", ["--policy", "full", "--tokens", "9999"], "9,999 were asked for: give more text"),
        ("perplexity", ["--policy", "snapkv:budget=40"], "say how many of the tokens are the prompt"),
        ("agreement", ["--policy", "full", "--prompt", "9999"], "say fewer"),
        ("agreement", ["--policy", "full", "--text", str(Path(__file__).parent / "nowhere.txt")], "cannot read"),
        ("recall", ["--policy", "full", "--task", "nothing"], "unknown task 'nothing'"),
        ("recall", ["--policy", "full", "--budget", "1.5"], "a budget must be"),
        ("recall", ["--policy", "full", "--limit", "0"], "'--limit': '0' is not a whole number from 1"),
        ("recall", ["--seed", "-1"], "'--seed': '-1' is not"),
        ("recall", ["--depth", "nan"], "'--depth': 'nan' is not"),
        ("recall", ["--depth", "inf"], "'--depth': 'inf' is not"),
        (
            "recall",
            ["--length", "1000000000", "--task", "passkey"],
            "prompts of 15,000,000,000 tokens in all are too many",
        ),
        ("recall", ["--length", "1000000000", "--task", "pairs", "--limit", "1"], "tokens in all are too many"),
        ("recall", ["--limit", "1000000000", "--task", "repeat"], "tokens in all are too many"),
        ("recall", ["--length", "-1000"], "'--length': '-1000' is not a whole number from 1"),
        ("recall", ["--policy", "full", "--length", "2000", "--task", "needle"], "give more text"),
        ("perplexity", ["--policy", "full", "--bucket", "0"], "'--bucket': '0' is not a whole number from 1"),
        ("perplexity", ["--policy", "full", "--tokens", "1000000000"], "1,000,000,000 were asked for: give more text"),
        ("perplexity", ["--policy", "full", "--tokens", "64", "--chunk", "2147483647"], "longest prompt, 64 tokens"),
        ("recall", ["--blind", "--task", "passkey", "--chunk", "2147483647"], "longest prompt, "),
        ("perplexity", ["--policy", "full", "--tokens", "-64"], "'--tokens': '-64' is not a whole number from 2"),
        ("agreement", ["--policy", "full", "--prompt", "0"], "'--prompt': '0' is not a whole number from 1"),
        ("agreement", ["--policy", "full", "--prompt", "-1"], "'--prompt': '-1' is not a whole number from 1"),
        ("perplexity", ["--policy", "full", "--text", "DIRECTORY"], "two texts are called 'text.txt': rename one"),
        (
            "perplexity",
            ["--policy", "full", "--dataset", "DIRECTORY", "--dataset", "DIRECTORY"],
            "has no text: give another",
        ),
    ],
)
def test_refuses(evaluate, text, tmp_path, monkeypatch, kind, arguments, message):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "text.txt").write_text("another")
    (folder / "test.jsonl").write_text('{"text": " "}\n')
    arguments = [str(folder) if one == "DIRECTORY" else one for one in arguments]
    code, _, err = evaluate(kind, "--text", text, "--out", tmp_path / "out", *arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_names_and_lengths(evaluate, checkpoints, tmp_path):
    """A stretch is the whole text, with what the tokenizer puts first; names are not markup."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ("[red].txt", "日本 \n x.txt", "b.md.txt"):
        (folder / name).write_text(TEXT)
    tokens = len(byte_level("begin").encode(TEXT))
    arguments = "--model", checkpoints["begin"], "--text", folder, "--limit", 9, "--policy", "full", "--out"
    code, printed, err = evaluate("perplexity", *arguments, tmp_path / "out", "--tokens", tokens)
    assert (code, "[red].txt" in printed) == (0, True), err
    found = rows(tmp_path / "out")
    assert [row["example"] for row in found] == ["[red].txt/0", "b.md.txt/0", "日本 \\n x.txt/0"]
    assert len({row["nll"] for row in found}) == 1
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["begin"] == [1]
    code, _, err = evaluate("perplexity", *arguments, tmp_path / "more", "--tokens", tokens + 1)
    assert (code, f"has {tokens} tokens, with the 1 that the tokenizer puts first; {tokens + 1} were" in err) == (
        2,
        True,
    )


def test_each_stretch_is_read_as_transformers_reads_it(evaluate, run_main, checkpoints, text, tmp_path):
    """With a tokenizer that puts two ids first: they are read, and not predicted."""
    model = checkpoints["two ids"]
    arguments = "--model", model, "--text", text, "--tokens", 32, "--policy", "full"
    for kind in ("perplexity", "agreement"):
        more = ("--prompt", 1) if kind == "agreement" else ()
        assert evaluate(kind, *arguments, *more, "--limit", 3, "--out", tmp_path / kind)[0] == 0
    report = tmp_path / "report.json"
    assert run_main(cli.main, "corm", "compare", *arguments, "--chunk", 16, "--json", report)[0] == 0
    ids, theirs, expected = byte_level("nothing").encode(TEXT * 30), LlamaForCausalLM.from_pretrained(model), []
    for start in (0, 30, 60):
        stretch = torch.tensor([[0, 1, *ids[start : start + 30]]])
        with torch.no_grad():
            logits = theirs(stretch).logits[0]
        expected.append(torch.nn.functional.cross_entropy(logits[1:-1], stretch[0, 2:]).item())
    for kind in ("perplexity", "agreement"):
        np.testing.assert_allclose([row["nll"] for row in rows(tmp_path / kind)], expected, atol=1e-5)
    assert len(set(np.round(expected, 3))) == 3
    found = json.loads(report.read_text())
    assert (found["scored"], found["rows"][0]["nll"]) == (30, pytest.approx(expected[0], abs=1e-5))


def test_another_tokenizer_is_another_run(evaluate, checkpoints, text, tmp_path):
    arguments = "--text", text, "--tokens", 32, "--limit", 1, "--policy", "full", "--out", tmp_path / "out"
    model = shutil.copytree(checkpoints["begin"], tmp_path / "model")
    assert evaluate("perplexity", "--model", model, *arguments)[0] == 0
    shutil.copy(f"{checkpoints['nothing']}/tokenizer.json", model)
    code, _, err = evaluate("perplexity", "--model", model, *arguments)
    assert (code, "(begin, prompts differ; begin was [1], not [])" in err) == (2, True), err


def test_a_program_serves_all_answers(evaluate, checkpoints, text, tmp_path, caplog):
    inner = byte_level("begin").inner
    inner.train_from_iterator(
        ["dead beef cafe face"] * 9, trainers.BpeTrainer(**TRAINING)
    )  # fewer tokens of some uuids
    model = shutil.copytree(checkpoints["begin"], tmp_path / "model")
    inner.save(str(model / "tokenizer.json"))
    arguments = "--text", text, "--length", 300, "--limit", 3, "--depth", 0.5, "--policy", "full", "--chunk", 4
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        code, _, err = evaluate("recall", "--model", model, "--task", "pairs", *arguments, "--out", tmp_path / "out")
    assert code == 0, err
    hay = recall.Haystack(Tokenizer(inner, ()), TEXT * 30)
    tasks = list(recall.tasks(hay, ["pairs"], [300], [0.5], 3, 0))
    assert len({len(task.gold) for task in tasks}) > 1
    assert len({len(task.prompt) for task in tasks}) > 1
    compiled = re.findall(r"Compiling jit\((_prefill_block|_forced|decode)\)", caplog.text)
    assert sorted(compiled) == ["_forced", "_prefill_block", "decode"]


def test_no_data(evaluate, tmp_path):
    for folder in (tmp_path, "x" * 300):
        code, _, err = evaluate("longbench", "--data", folder, "--out", tmp_path / "out")
        assert (code, "there is no task of LongBench" in err) == (2, True)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("dataset2prompt.json", {"qasper": "{0.__class__.__mro__}"}, "template of qasper cannot be used: it may hold"),
        ("dataset2prompt.json", {"qasper": "{context.__init__.__globals__}"}, "not {context.__init__.__globals__}"),
        ("dataset2prompt.json", {"qasper": "{context:>1000000000}"}, "not {context:>1000000000}"),
        ("dataset2prompt.json", {"qasper": "{context!r}"}, "it may hold {input} and {context}, not {context!r}"),
        ("dataset2prompt.json", {"qasper": "{answers}"}, "not {answers}"),
        ("dataset2prompt.json", {"qasper": "{}"}, "not {}"),
        ("dataset2prompt.json", {"qasper": "{context"}, "template of qasper cannot be used: expected '}'"),
        ("dataset2prompt.json", {"qasper": ["{context}"]}, "template of qasper cannot be used: it is no text"),
        ("dataset2prompt.json", {"trec": "{context}"}, "do not both have 'qasper'"),
        ("dataset2prompt.json", ["{context}"], "dataset2prompt.json cannot be used: Input should be an object, not"),
        ("dataset2maxlen.json", {"qasper": "16"}, "must be a number of tokens from 1 up, not '16'"),
        ("dataset2maxlen.json", {"qasper": True}, "must be a number of tokens from 1 up, not True"),
        ("dataset2maxlen.json", {"qasper": 0}, "must be a number of tokens from 1 up, not 0"),
        ("dataset2maxlen.json", {"qasper": 10**30}, "prompts of 128 tokens leave nothing beside"),
        (
            "qasper.jsonl",
            {"input": 3},
            "qasper.jsonl, line 1, cannot be used: input: Input should be a valid string, not 3",
        ),
        ("qasper.jsonl", {"context": None}, "context: Input should be a valid string, not None"),
        ("qasper.jsonl", {"answers": "it"}, "answers: Input should be a valid array, not 'it'"),
        ("qasper.jsonl", {"answers": ["it", 3]}, "answers.1: Input should be a valid string, not 3"),
        ("qasper.jsonl", {"all_classes": {}}, "all_classes: Input should be a valid array, not {}"),
        ("qasper.jsonl", {"all_classes": [None]}, "all_classes.0: Input should be a valid string"),
        ("qasper.jsonl", b"", "there is nothing to read in dataset2prompt.json, dataset2maxlen.json, qasper.jsonl"),
        ("qasper.jsonl", b"[" * 10**5, "Invalid JSON: recursion limit exceeded"),
        ("qasper.jsonl", b'\n \n{"input": "\\ud800"}', "qasper.jsonl, line 3, cannot be used: Invalid JSON"),
    ],
)
def test_data_that_cannot_be_used(evaluate, data, tmp_path, file, content, message):
    path = data / file
    if isinstance(content, dict) and file == "qasper.jsonl":
        content = json.loads(path.read_text().splitlines()[0]) | content
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    arguments = "--data", data, "--task", "qasper", "--length", 128, "--policy", "full", "--out", tmp_path / "out"
    code, _, err = evaluate("longbench", *arguments)
    assert (code, err.count("\n"), message in err) == (2, 1, True), err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_again_and_again(model, text, tmp_path):
    """Kills at random moments, and the file is what it is without."""
    arguments = ["eval", "perplexity", "--model", model, "--text", str(text), "--tokens", "48", "--limit", "6"]
    command = [sys.executable, "-c", "from corm_jax.command.cli import main; main()", *arguments, *POLICIES, "--out"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True, capture_output=True)
    out, moments, kills = tmp_path / "out", random.Random(0), 0
    while kills < KILLS:
        process = subprocess.Popen(
            [*command, str(out)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        there = (out / RESULTS).stat().st_size if (out / RESULTS).exists() else 0
        while process.poll() is None and (not (out / RESULTS).exists() or (out / RESULTS).stat().st_size == there):
            time.sleep(0.001)
        time.sleep(moments.random() * 0.02)
        if process.poll() is not None:
            break  # done before it could be killed
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == KILLS
    subprocess.run([*command, str(out)], env=environment, check=True, capture_output=True)
    assert (out / RESULTS).read_bytes() == (tmp_path / "whole" / RESULTS).read_bytes()
