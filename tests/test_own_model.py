"""``--model module:function``: a model of the user's own on the command line."""

import json
import sys

import pytest

from corm_jax.command.cli import main
from simulator.cli import main as simulator

GOOD = """
import jax.numpy as jnp, numpy as np
from jax.tree_util import Partial
import corm_jax as cj

SHAPE = cj.Shape(vocab=256, layers=2, heads=4, kv_heads=2, head_dim=8, context=512)

def embed(table, tokens, position):
    return table[tokens]

def layer(weights, x, position, attend):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, weights[name]) for name in "qkv")
    rotary = cj.Rotary(cj.Rope().frequencies(8))
    return x + jnp.einsum("bthk,hkd->btd", attend(q, k, v, rotary), weights["out"])

def logits(table, x):
    return x @ table.T

class Bytes:
    end = (0,)
    def encode(self, text):
        return list(text.encode())
    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

def load():
    rng = np.random.default_rng(0)
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)
    shapes = {"q": (16, 4, 8), "k": (16, 2, 8), "v": (16, 2, 8), "out": (4, 8, 16)}
    layers = tuple(Partial(layer, {name: normal(*shape) for name, shape in shapes.items()}) for _ in range(2))
    table = normal(256, 16)
    return cj.adapters.Functions(SHAPE, Partial(embed, table), layers, Partial(logits, table)), Bytes()

four = 4
def half():
    return load()[0]
def headless():
    model, tokenizer = load()
    class Model:
        config, layers, embed = model.config, model.layers, model.embed
    return Model(), tokenizer
def wordless():
    return load()[0], object()
def short():
    model, tokenizer = load()
    return model._replace(layers=model.layers[:1]), tokenizer
def broken():
    return 1 / 0
"""


@pytest.fixture
def corm(tmp_path, monkeypatch, run_main):
    """Runs ``corm`` in a directory with a module of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    for name in ("mine", "nonsense", "needy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "mine.py").write_text(GOOD)
    (tmp_path / "nonsense.py").write_text("x = (\n")
    (tmp_path / "needy.py").write_text("import not_there_at_all\n")
    return lambda *arguments: run_main(main, "corm", *arguments)


MINE = ("--model", "mine:load")
POLICIES = ("--policy", "full", "--policy", "corm:window=8,recent=4")


def test_every_command_takes_it(corm, tmp_path, run_main):
    code, out, err = corm("generate", *MINE, "--prompt", "The cat", "--max-new-tokens", 5)
    assert (code, err) == (0, "")
    assert "keys live in a head" in out
    assert corm("compare", *MINE, *POLICIES, "--tokens", 64, "--json", "compare.json")[0] == 0
    full, evicted = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert full["kept_final"] == 1 > evicted["kept_final"]
    assert corm("record", *MINE, "--tokens", 64, "--out", "trace")[0] == 0
    code, out, _ = run_main(simulator, "simulator", "check", "trace", "--policy", "corm:window=8,recent=4")
    assert code == 0
    assert "mine:load" in (tmp_path / "trace" / "meta.json").read_text()
    arguments = ("--tokens", 64, "--limit", 1, "--chunk", 4, "--out", "runs")
    assert corm("eval", "perplexity", *MINE, *POLICIES, *arguments)[0] == 0
    assert (tmp_path / "runs").is_dir()


def test_it_is_calibrated(corm, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    arguments = ("--text", words, "--tokens", 256, "--target-live", 0.9, "--out", "profile.json")
    assert corm("calibrate", *MINE, *arguments)[0] == 0
    policy = ("--policy", "corm:profile=profile.json")
    assert corm("generate", *MINE, *policy, "--prompt", "The", "--max-new-tokens", 1)[0] == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere:load", "there is no module 'nowhere' in "),
        ("mine:laod", "mine.py has no 'laod': name a function that returns (decoder, tokenizer)"),
        ("mine:four", "four in "),
        ("mine:half", "half() returned an object of type Functions, but it must return (decoder, tokenizer)"),
        ("mine:headless", "the decoder is a Model, which has no logits (a method): see corm_jax.Decoder"),
        ("mine:wordless", "the tokenizer (a object) has no method encode"),
        ("mine:short", "the decoder has 1 layers, and its config says 2"),
        ("mine:broken", "line 49, 'return 1 / 0': ZeroDivisionError: division by zero"),
        ("nonsense:load", "nonsense.py, line 1: '(' was never closed"),
        ("needy:load", "line 1, 'import not_there_at_all': ModuleNotFoundError: No module named 'not_there_at_all'"),
    ],
)
def test_mistakes_are_named(corm, model, message):
    code, out, err = corm("generate", "--model", model, "--prompt", "The")
    assert (code, out) == (2, "")
    assert f"--model {model}" in err
    assert message in " ".join(err.split())


def test_the_dtype_is_the_modules_own(corm):
    code, _, err = corm("generate", *MINE, "--dtype", "bfloat16", "--prompt", "The")
    assert code == 2
    assert "--dtype bfloat16 is for checkpoints: mine:load chooses" in " ".join(err.split())


def test_help_says_that_it_is_imported(corm):
    for command in ("generate", "compare", "record", "calibrate"):
        assert "which is imported and called" in " ".join(corm(command, "--help")[1].split())
