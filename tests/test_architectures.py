"""Architectures of GGUF files: each is the model of the Hugging Face directory it was converted from, or is refused."""

import contextlib
import math
from dataclasses import asdict

import gguf
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from corm_jax import CheckpointError
from corm_jax.model import checkpoint
from corm_jax.model.gguf import ARCHITECTURES

SIZE = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED = SIZE | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}
LOCAL = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.25, 1.5],
    "long_factor": [2.0, 4.0, 6.0],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}
LINEAR = {"full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0}}
LINEAR |= {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
MODELS = {
    "llama": lambda t: t.LlamaConfig(**GROUPED),
    "llama, of Mistral": lambda t: t.MistralConfig(**GROUPED, sliding_window=None),
    "qwen2": lambda t: t.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda t: t.Qwen3Config(**GROUPED, head_dim=16),
    "phi3": lambda t: t.Phi3Config(**GROUPED, sliding_window=24, pad_token_id=0),
    "phi3, LongRoPE": lambda t: t.Phi3Config(
        **GROUPED, rope_parameters=LONGROPE, original_max_position_embeddings=64, pad_token_id=0, sliding_window=None
    ),
    "gemma2": lambda t: t.Gemma2Config(**GROUPED | LOCAL, attn_logit_softcapping=8.0, final_logit_softcapping=6.0),
    "gemma3": lambda t: t.Gemma3TextConfig(**GROUPED | LOCAL | {"num_hidden_layers": 7}),
    "gemma3, with a factor": lambda t: t.Gemma3TextConfig(
        **GROUPED | LOCAL | {"num_hidden_layers": 7}, rope_parameters=LINEAR
    ),
    "gpt2": lambda t: t.GPT2Config(vocab_size=53, n_embd=32, n_layer=3, n_head=4, n_positions=256),
    "gptneox": lambda t: t.GPTNeoXConfig(**SIZE, rotary_pct=0.25),
    "bloom": lambda t: t.BloomConfig(vocab_size=53, hidden_size=48, n_layer=3, n_head=6),
}


def by_part(value, heads):
    """Rows of q, k and v, which BLOOM and GPT-NeoX sort by head, as llama.cpp's converter sorts them."""
    return value.reshape(heads, 3, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)


def interleaved(value, heads):
    return value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)


def converted(architecture, config, name, value):
    """A tensor as llama.cpp's converter changes it."""
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    if "query_key_value" in name:
        return by_part(value, config.num_attention_heads)
    if architecture == "gpt2" and value.ndim == 2 and ".h." in name:
        return value.T
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        return interleaved(value, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
    return value


def metadata(architecture, config):
    """The fields that llama.cpp's converter writes."""
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    context = {"bloom": 2048}.get(architecture) or config.max_position_embeddings
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": context,
        "embedding_length": width,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * width,
        "attention.head_count": heads,
    }
    if architecture in ("gpt2", "gptneox", "bloom"):
        eps = getattr(config, "layer_norm_epsilon", None) or config.layer_norm_eps
        found["attention.layer_norm_epsilon"] = eps
    else:
        found["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
        found["attention.head_count_kv"] = config.num_key_value_heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        found["rope.freq_base"] = float(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if "partial_rotary_factor" in rope:
        found["rope.dimension_count"] = int(rope["partial_rotary_factor"] * head_dim)
    if architecture in ("qwen3", "gemma2", "gemma3"):
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if architecture in ("gemma2", "gemma3", "phi3"):
        found["attention.sliding_window"] = config.sliding_window or 0
    if architecture == "gemma2":
        found["attn_logit_softcapping"] = config.attn_logit_softcapping
        found["final_logit_softcapping"] = config.final_logit_softcapping
    if architecture == "gptneox":
        found["use_parallel_residual"] = config.use_parallel_residual
    if rope.get("rope_type") == "longrope":
        scale, original = context / 64, 64
        found["rope.scaling.original_context_length"] = original
        found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
    return {f"{architecture}.{key}": value for key, value in found.items()}


def write(path, architecture, model, **changes):
    """A GGUF file of a model of transformers. Changes are fields or tensors; None takes one away."""
    config = model.config
    fields, tensors = metadata(architecture, config), {}
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    bare = "transformer." if architecture == "bloom" else ""
    for name, value in model.state_dict().items():
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            place = names.get_name(name.removeprefix(bare), try_suffixes=(".weight", ".bias"))
            tensors[place] = converted(architecture, config, name, value.float().numpy())
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in ("short", "long"):
        if f"{kind}_factor" in rope:
            tensors[f"rope_factors_{kind}.weight"] = np.array(rope[f"{kind}_factor"], np.float32)
    for key, value in changes.items():
        here = tensors if isinstance(value, np.ndarray) or key in tensors else fields
        here.pop(key, None)
        if value is not None:
            here[key] = value
    writer = gguf.GGUFWriter(path, architecture)
    types = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    for key, value in fields.items():
        writer.add_key_value(key, value, gguf.GGUFValueType[types[type(value)]])
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def theirs(name):
    """Transformers' model, its parameters drawn at random, norms and biases included."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](transformers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def sizes(config):
    """A configuration in numbers of float32, which GGUF stores."""
    flat = asdict(config)
    for key in ("rope", "local_rope"):
        flat[key] = flat[key] and flat[key]._asdict()
    return {key: rounded(value) for key, value in flat.items()}


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(map(rounded, value))
    return float(f"{value:.6g}") if isinstance(value, float) else value


@pytest.mark.parametrize("name", MODELS)
def test_the_file_is_the_model_of_the_directory(tmp_path, name):
    """The same shape, decoder and parameters as from transformers' own file, which other tests compare in logits."""
    model = theirs(name)
    model.save_pretrained(tmp_path / "directory")
    path = write(tmp_path / "model.gguf", name.partition(",")[0], model)
    for context in (None, 200):  # beyond LongRoPE's original one
        first, second = (checkpoint.open_source(str(one), context) for one in (tmp_path / "directory", path))
        assert sizes(first.config) == sizes(second.config)
    first, second = (dict(nnx.to_flat_state(nnx.state(checkpoint.build(one)))) for one in (first, second))
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_allclose(value[...], second[key][...], rtol=1e-6, err_msg=str(key))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_not_known_is_refused(tmp_path, architecture):
    model, path = theirs(architecture), tmp_path / "model.gguf"
    for key, value in {
        f"{architecture}.attention.scale": 0.5,
        f"{architecture}.expert_count": 8,
        f"{architecture}.attention.causal": False,
        f"{architecture}.block_count": None,
        "unknown.key": 1,
        "blk.1.attn_sinks.weight": np.ones(4, np.float32),
        "output_norm.weight": None,
    }.items():
        with pytest.raises(CheckpointError) as raised:
            checkpoint.build(checkpoint.open_source(write(path, architecture, model, **{key: value})))
        assert key in str(raised.value)


def keys(architecture, group=gguf.Keys):
    """Every key that GGUF's constants know."""
    for value in vars(group).values():
        if isinstance(value, str) and "." in value and not value.startswith(("gguf.", "tokenizer.", "general.")):
            with contextlib.suppress(KeyError):
                yield value.format(arch=architecture, id=0, name="x")
        elif isinstance(value, type):
            yield from keys(architecture, value)


NO_NUMBERS = {"split.no", "split.count", "split.tensors.count", "rope.scaling.finetuned"}
NO_NUMBERS |= {"rope.scaling.original_context_length"}
AS_IT_IS = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scaling.attn_factor": 1}
AS_IT_IS |= {"attention.sliding_window": 0}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gemma3", "bloom"])
def test_every_key_is_used_or_harmless_or_refused(tmp_path, architecture):
    """A key that changes no number of the shape is harmless, says what is so anyway, or is a field's value already."""
    model, path = theirs(architecture), tmp_path / "model.gguf"
    plain = sizes(checkpoint.open_source(write(path, architecture, model)).config)
    fields = {field.alias for field in ARCHITECTURES[architecture].model_fields.values()}
    refused, used = set(), set()
    for key in sorted(set(keys(architecture)) | fields):
        short = key.removeprefix(f"{architecture}.")
        for value in (0, 1, 5, 0.75, "x", True) if key in fields else (1, "x"):
            try:
                found = checkpoint.open_source(write(path, architecture, model, **{key: value})).config
            except CheckpointError:
                refused.add(key)
                continue
            if sizes(found) != plain:
                used.add(key)
            elif key not in fields and short not in NO_NUMBERS:
                assert AS_IT_IS[short] == value, (key, value)
    assert len(refused - fields) > 80  # by name: see the test above
    assert used <= fields
    assert {f"{architecture}.{name}" for name in ("context_length", "feed_forward_length")} <= used


def test_other_architectures_are_refused_by_name(tmp_path):
    model = theirs("llama")
    path = write(tmp_path / "model.gguf", "llama", model)
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content.replace(b"llama", b"mamba"))
    with pytest.raises(CheckpointError, match="'general.architecture' = 'mamba': only llama, qwen2, .* are read"):
        checkpoint.open_source(path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma3", {"gemma3.attention.sliding_window": None}, "gemma3.attention.sliding_window: Field required"),
        ("gemma3", {"gemma3.final_logit_softcapping": 30.0}, "'gemma3.final_logit_softcapping' = 30.0 is unknown"),
        ("gemma3", {"gemma3.rope.dimension_count": 8}, "'gemma3.rope.dimension_count' = 8 is not"),
        ("phi3", {"phi3.rope.dimension_count": 9}, "'phi3.rope.dimension_count' = 9 is no even number up to"),
        ("phi3, LongRoPE", {"rope_factors_long.weight": None}, "'rope_factors_long.weight' is missing"),
        ("phi3, LongRoPE", {"rope_factors_long.weight": np.ones(4, np.float32)}, "has shape (4,), where (3,) is"),
        ("qwen2", {"qwen2.attention.sliding_window": 128}, "'qwen2.attention.sliding_window' = 128 is not supported"),
        ("qwen2", {"blk.1.attn_q.bias": None}, "tensor 'blk.1.attn_q.bias' is missing"),
        ("gptneox", {"gptneox.use_parallel_residual": None}, "gptneox.use_parallel_residual: Field required"),
    ],
)
def test_fields_of_one_architecture(tmp_path, name, changes, message):
    path = write(tmp_path / "model.gguf", name.partition(",")[0], theirs(name), **changes)
    with pytest.raises(CheckpointError) as raised:
        checkpoint.build(checkpoint.open_source(path))
    assert message in str(raised.value)


def test_what_gemma_may_leave_out(tmp_path):
    """Windows and bases as llama.cpp has them without their keys, and as the keys say."""
    path = tmp_path / "model.gguf"
    config = checkpoint.open_source(write(path, "gemma3", theirs("gemma3"))).config
    assert config.windows == (24, 24, 24, 24, 24, None, 24)
    assert (config.rope.theta, config.local_rope.theta) == (1e6, 1e4)
    said = {"gemma3.attention.sliding_window_pattern": 2, "gemma3.rope.freq_base_swa": 500.0}
    config = checkpoint.open_source(write(path, "gemma3", theirs("gemma3"), **said)).config
    assert config.windows == (24, None, 24, None, 24, None, 24)
    assert (config.rope.theta, config.local_rope.theta) == (1e6, 500.0)
    source = checkpoint.open_source(write(path, "gemma2", theirs("gemma2"), **{"gemma2.final_logit_softcapping": None}))
    assert source.config.softcap == 30
    assert any("no gemma2.final_logit_softcapping: 30.0 is assumed" in note for note in source.notes)
