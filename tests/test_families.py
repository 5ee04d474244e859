"""All families of models, each against transformers: logits, keys of the config one at a time, and tensors."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks import parity_families as bench
from corm_jax import CheckpointError, Config, Corm, CormError, Full, Rope, Transformer, generate
from corm_jax.model import checkpoint, huggingface
from corm_jax.model.decoder import forward, make_caches
from corm_jax.model.families.family import HARMLESS
from corm_jax.runs.perplexity import read_text
from corm_jax.runs.recording import record

QUICK = ("gemma3", "gpt_neox", "bloom")
FAMILIES = [one if one in QUICK else pytest.param(one, marks=pytest.mark.nightly) for one in bench.FAMILIES]
ONE_OF_EACH = ["mistral, windows", "qwen2, windows", "qwen3", "phi3, LongRoPE", "gemma2", "gemma3", "gpt2", "gpt_neox"]
ONE_OF_EACH += ["opt", "bloom"]  # for Llamas see tests/test_consumed.py
KEYS_TOO = ("bloom",)
JUNK = [None, True, False, 0, -1, 3, 0.5, 2**40, "x", [1], {"a": 1}]
OTHERS = {key for make in bench.FAMILIES.values() for key in make(transformers).to_dict()}
OTHERS |= {"rope_theta", "rope_scaling", "partial_rotary_factor", "qk_norm", "attention_bias", "use_sliding_window"}
OTHERS |= {"sliding_window_pattern", "logits_scaling", "embedding_multiplier", "norm_type", "unknown"}
IDS = np.random.default_rng(0).integers(3, 101, 30)


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(50)
    yield
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a family's random model."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("family")
            bench.theirs(family, made[family])
        return made[family]

    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_through_a_cache(family):
    assert max(bench.differences(*bench.pair(family))) < bench.BOUND


def ours(path):
    """Our logits without compiling anything, or the message of the error."""
    try:
        model = checkpoint.build(checkpoint.open_source(str(path)))
    except CheckpointError as error:
        return None, str(error)
    caches = make_caches(model, Full(), batch=1, capacity=len(IDS), chunk=len(IDS))
    with jax.disable_jit():
        x, *_ = forward(model, Full(), caches, jnp.asarray(IDS)[None], jnp.array([len(IDS)]), chunk=len(IDS))
        return np.asarray(model.logits(x[0])), ""


def theirs(path):
    """Those of transformers; None where it raises, or would draw weights at random."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
        )
        with torch.no_grad():
            logits = model(torch.tensor(IDS)[None]).logits[0].numpy()
    except Exception:
        return None
    return None if any(report.values()) else logits


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=pytest.mark.slow if one in KEYS_TOO else pytest.mark.nightly) for one in ONE_OF_EACH],
)
def test_every_key_of_a_config(saved, tmp_path, family):
    """A key is used as transformers uses it, or refused by name; one that neither knows changes nothing."""
    path = shutil.copytree(saved(family), tmp_path / "copy")
    file = path / "config.json"
    config = json.loads(file.read_text())
    logits, _ = ours(path)
    assert logits is not None
    read = {shape_of(path)[0]: logits}
    for key in sorted(OTHERS - HARMLESS):
        for value in JUNK if key in config else JUNK[2:9:3]:
            changed = {**config, key: value}
            file.write_text(json.dumps(changed))
            shape, message = shape_of(path)
            if shape is not None and shape not in read:
                read[shape], message = ours(path)
            if message:
                named = any(name in message for name in (key, "tensor '", "rope type", "layer_types"))
                assert named, f"{key} = {value}: {message}"
                assert "\n" not in message
            elif shape.rope and shape.rope.kind == "dynamic" and shape.context < len(IDS):
                continue  # transformers rotates all tokens of a block as its last one
            elif (expected := theirs(path)) is not None:
                np.testing.assert_allclose(read[shape], expected, atol=2e-4, err_msg=f"{key} = {value}")


def shape_of(path):
    """The shape of the decoder, or the message of the error."""
    try:
        return checkpoint.open_source(str(path)).config, ""
    except CheckpointError as error:
        return None, str(error)


@pytest.mark.parametrize("family", [*QUICK, "phi3, LongRoPE", "opt"])
def test_every_tensor_is_needed_and_no_other_is_read(saved, tmp_path, family):
    path = shutil.copytree(saved(family), tmp_path / "copy")
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.extra.weight": np.zeros(3, np.float32)}, file)
    assert "extra.weight' has no place in the decoder" in ours(path)[1]
    for name in tensors:
        save_file({key: value for key, value in tensors.items() if key != name}, file)
        assert f"{name!r} is missing" in ours(path)[1]
        broken = {**tensors, name: tensors[name][..., :-1].copy()}
        save_file(broken, file)
        assert f"{name!r} has shape {broken[name].shape}, where {tensors[name].shape} is expected" in ours(path)[1]


def test_files_of_a_model_without_a_head(saved, tmp_path):
    """On the hub, GPT-2 and BLOOM have no prefix, and GPT-2 has its masks beside its parameters."""
    path = shutil.copytree(saved("gpt2"), tmp_path / "copy")
    expected = checkpoint.build(checkpoint.open_source(str(path)))
    file = path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    tensors |= {"h.0.attn.bias": np.tril(np.ones((1, 1, 8, 8), bool)), "h.1.attn.masked_bias": np.float32(-1e4)[None]}
    save_file(tensors, file)
    found = checkpoint.build(checkpoint.open_source(str(path)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_longer_texts_have_frequencies_of_their_own(saved):
    """LongRoPE: beyond the original context every token is rotated otherwise, as in transformers."""
    path = saved("phi3, LongRoPE")
    short = checkpoint.open_source(str(path))
    assert short.config.context == 128
    assert any("texts end at 128 tokens; for longer ones, up to 512, load" in note for note in short.notes)
    ids = np.random.default_rng(1).integers(3, 101, 140)
    model = checkpoint.build(checkpoint.open_source(str(path), 512))
    caches = make_caches(model, Full(), batch=1, capacity=140)
    x, *_ = forward(model, Full(), caches, jnp.asarray(ids)[None], jnp.array([140]), chunk=1)
    other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = other(torch.tensor(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(model.logits(x[0]), expected, atol=1e-4)


def test_a_dynamic_base_depends_on_the_position_alone():
    """Below the original context nothing changes; beyond it a token is rotated as the last one of its text."""
    rope = Rope(kind="dynamic", factor=4.0, original_context=16)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 2, 8)), jnp.float32)
    position = jnp.arange(40)
    found = rope.encoding(8).rotate(x, position)
    plain = Rope().encoding(8).rotate(x, position)
    np.testing.assert_allclose(found[:16], plain[:16], atol=1e-5)
    for last in (16, 25, 39):
        stretched = Rope(theta=10000.0 * (4 * (last + 1) / 16 - 3) ** (8 / 6))
        np.testing.assert_allclose(found[last], stretched.encoding(8).rotate(x, position)[last], atol=1e-4)


def test_learned_positions_end_with_their_table():
    """Tokens beyond it are refused; the padding of a block may stand there, and changes nothing."""
    shape = {"vocab": 101, "dim": 16, "hidden": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8}
    long, short = (
        Transformer(Config(**shape, rope=None, learned=True, context=context), rngs=nnx.Rngs(0))
        for context in (600, 40)
    )
    short.learned.embedding[...] = long.learned.embedding[:40]
    for path in ("layers", "norm", "embedding", "head"):
        setattr(short, path, getattr(long, path))
    policy = Corm(window=8, recent=4)
    readings = [read_text(model, policy, IDS.tolist()) for model in (long, short)]
    np.testing.assert_allclose(readings[1].nll, readings[0].nll, atol=1e-6)
    assert len(generate(short, policy, [IDS], max_new_tokens=10).tokens[0]) == 10
    for call in (
        lambda: generate(short, policy, [IDS], max_new_tokens=11),
        lambda: read_text(short, policy, [*IDS.tolist(), *range(11)]),
        lambda: next(iter(record(short, list(range(41))))),
    ):
        with pytest.raises(CormError, match="41 tokens cannot be read: the model has learned 40 positions"):
            call()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "'do_layer_norm_before' = False is not supported: only True is"),
        ("opt", {"word_embed_proj_dim": 16}, "'word_embed_proj_dim' = 16 is not 'hidden_size' = 32"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "is not supported: only False is"),
        ("bloom", {"n_embed": 64}, "'n_embed' and 'hidden_size' contradict each other"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "is not supported: only False is"),
        ("gpt_neox", {"rotary_pct": 0.25, "partial_rotary_factor": 0.5}, "contradict each other"),
        ("gemma3", {"layer_types": ["full_attention"]}, "'layer_types' has 1 entries for 7 layers"),
        ("gemma3", {"sliding_window": None}, "'layer_types' has 'sliding_attention', and there is no 'sliding_window'"),
        ("gemma3", {"num_hidden_layers": 2**31 - 1}, "is more than a model with windows may have, 10000"),
        ("gemma3", {"use_bidirectional_attention": True}, "is not supported: only False is"),
        ("gemma3", {"model_type": "gemma3"}, "has 'model_type' = 'gemma3': the families that are read are llama"),
        ("phi3, LongRoPE", {"sliding_window": 0}, "sliding_window: must be a positive whole number"),
    ],
)
def test_what_the_decoder_does_not_do_is_refused(saved, tmp_path, family, changes, message):
    path = shutil.copytree(saved(family), tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError) as error:
        checkpoint.open_source(str(path))
    assert message in str(error.value)


def test_every_family_is_tried():
    types = {make(transformers).model_type for make in bench.FAMILIES.values()}
    assert types == set(huggingface.FAMILIES)
