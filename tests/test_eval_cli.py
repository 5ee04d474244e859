"""``corm eval`` on a tiny model: what it writes, how it goes on after a kill, what it refuses."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from corm_jax import cli
from corm_jax.evaluation.records import CONFIG, RESULTS
from tests.test_checkpoint import TEXT

KILLS = 3
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
    assert "6 results are there already" in err
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
    assert "`qasper/0`:" in words
    assert words.count("| `corm:window=8,recent=4` |") >= 3
    assert all((tmp_path / f"page-{kind}.png").exists() for kind in ("perplexity", "longbench"))
    (tmp_path / "bench" / RESULTS).write_text("")
    code, _, err = run_main(cli.main, "corm", "report", tmp_path / "bench", "--out", page)
    assert (code, "has no results yet: run corm eval longbench first" in err) == (2, True)
    code, _, err = run_main(cli.main, "corm", "report", tmp_path, "--out", page)
    assert (code, "is no result directory" in err) == (2, True)


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


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("perplexity", ["--policy", "nothing"], "unknown policy 'nothing'"),
        ("perplexity", ["--policy", "full", "--tokens", "1"], "'--tokens': '1' is not a whole number from 2"),
        ("perplexity", ["--policy", "full", "--tokens", "9999"], "--tokens asks for 9,999"),
        ("perplexity", ["--policy", "snapkv:budget=40"], "say how many of the tokens are the prompt"),
        ("agreement", ["--policy", "full", "--prompt", "9999"], "say fewer"),
        ("agreement", ["--policy", "full", "--text", str(Path(__file__).parent / "nowhere.txt")], "cannot read"),
        ("recall", ["--policy", "full", "--task", "nothing"], "unknown task 'nothing'"),
        ("recall", ["--policy", "full", "--budget", "1.5"], "a budget must be"),
        ("recall", ["--policy", "full", "--limit", "0"], "'--limit': '0' is not a whole number from 1"),
    ],
)
def test_refuses(evaluate, text, tmp_path, kind, arguments, message):
    code, _, err = evaluate(kind, "--text", text, "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out" / RESULTS).exists()


def test_no_data(evaluate, tmp_path):
    code, _, err = evaluate("longbench", "--data", tmp_path, "--out", tmp_path / "out")
    assert (code, "there is no task of LongBench" in err) == (2, True)


def test_killed_again_and_again(model, text, tmp_path):
    """Kills at random moments, and the file is what it is without."""
    arguments = ["eval", "perplexity", "--model", model, "--text", str(text), "--tokens", "48", "--limit", "6"]
    command = [sys.executable, "-c", "from corm_jax.cli import main; main()", *arguments, *POLICIES, "--out"]
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
