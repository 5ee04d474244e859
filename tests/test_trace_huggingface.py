"""Traces of models of `transformers`: their softmax is what these models return as attentions, or they are refused."""

import numpy as np
import pytest
import torch
import transformers

from corm_jax import Corm
from corm_jax.traces.arrays import TraceError
from corm_jax.traces.trace import Trace
from simulator.huggingface import record
from simulator.replay import replay

TOKENS = np.random.default_rng(0).integers(0, 99, 23)
SIZE = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3,
}  # fmt: skip
GQA = SIZE | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, "bos_token_id": 0}
NO_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS = {
    "llama": transformers.LlamaConfig(**GQA),
    "llama, MHA": transformers.LlamaConfig(**SIZE),
    "llama, MQA": transformers.LlamaConfig(**SIZE | {"num_key_value_heads": 1}),
    "qwen3": transformers.Qwen3Config(**GQA, head_dim=8),  # which normalises queries and keys
    "mistral": transformers.MistralConfig(**GQA, sliding_window=23),
    "gemma2": transformers.Gemma2Config(**GQA, head_dim=8, attn_logit_softcapping=None, query_pre_attn_scalar=30),
    "granite": transformers.GraniteConfig(**GQA, attention_multiplier=0.2),
    "mistral, a window": transformers.MistralConfig(**GQA, sliding_window=7),
    "gemma2, capped": transformers.Gemma2Config(**GQA, head_dim=8, attn_logit_softcapping=2.0, sliding_window=7),
    "gemma3": transformers.Gemma3TextConfig(
        **GQA, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "bloom": transformers.BloomConfig(
        vocab_size=99, hidden_size=48, n_layer=2, n_head=6, initializer_range=0.3, slow_but_exact=True
    ),
    "gpt2": transformers.GPT2Config(**GPT2, eos_token_id=0),  # which has positions of its own
}
WINDOWS = {"mistral": (23, 23), "mistral, a window": (7, 7), "gemma2": (4096, None), "gemma2, capped": (7, None)}
WINDOWS["gemma3"] = (5, None)
OTHERWISE = {
    "sinks": transformers.GptOssConfig(**GQA | NO_ENDS, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    "later tokens": transformers.BertConfig(**SIZE),
    "another scale in each layer": transformers.GPT2Config(
        **GPT2, eos_token_id=0, scale_attn_by_inverse_layer_idx=True
    ),
    "biases, in code of its own": transformers.MptConfig(vocab_size=99, d_model=32, n_layers=2, n_heads=4),
}


def build(config, attention="eager", dtype=torch.float32):
    torch.manual_seed(0)
    kind = transformers.AutoModel if isinstance(config, transformers.BertConfig) else transformers.AutoModelForCausalLM
    return kind.from_config(config, attn_implementation=attention).to(dtype)


def softmax_of(trace, index):
    """Attention ``[q_heads, steps, steps]`` from a layer of a trace, in float64."""
    q, k, _ = (x.astype(np.float64) for x in trace.layer(index))
    k = k.repeat(trace.meta.group, axis=1)
    logits = trace.meta.scale * np.einsum("qhd,khd->hqk", q, k)
    if cap := trace.meta.softcap:
        logits = cap * np.tanh(logits / cap)
    distance = np.arange(trace.meta.steps)[:, None] - np.arange(trace.meta.steps)
    logits -= np.reshape(trace.meta.slopes or [0.0], (-1, 1, 1)) * distance
    window = (trace.meta.windows or [None] * trace.meta.layers)[index] or trace.meta.steps
    weights = np.exp(np.where((distance >= 0) & (distance < window), logits, -np.inf))
    return weights / weights.sum(-1, keepdims=True)


def attentions_of(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)[None], output_attentions=True).attentions


@pytest.mark.parametrize("name", MODELS)
def test_softmax_of_the_trace_is_the_attention_of_the_model(name):
    model = build(MODELS[name])
    trace, attentions = record(model, TOKENS), attentions_of(model)
    heads = MODELS[name].num_attention_heads
    group = heads // getattr(MODELS[name], "num_key_value_heads", heads)
    assert (trace.meta.group, trace.meta.tokens, trace.meta.layers) == (group, tuple(TOKENS), 2)
    for index, rows in enumerate(attentions):
        np.testing.assert_allclose(softmax_of(trace, index), rows[0], atol=1e-5)
    assert trace.meta.windows == WINDOWS.get(name)
    for rows in (
        Trace.from_attention(attentions, windows=trace.meta.windows),
        Trace.from_attention([rows[0].numpy() for rows in attentions]),
    ):
        np.testing.assert_array_equal(rows.layer(1).probs, attentions[1][0])


def test_both_ways_replay_alike():
    model = build(MODELS["llama"])
    keys, rows = record(model, TOKENS), Trace.from_attention(attentions_of(model), kv_heads=2)
    one, other = (replay(trace, Corm(window=4, recent=2)) for trace in (keys, rows))
    np.testing.assert_array_equal(one.until, other.until)
    np.testing.assert_allclose(one.mass, other.mass, atol=1e-5)
    assert one.error is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_whatever_its_dtype_and_implementation(dtype):
    model = build(MODELS["llama"], "sdpa", dtype).train()
    trace = record(model, torch.tensor(TOKENS)[None])
    assert model.training
    model.set_attn_implementation("eager")
    attentions = attentions_of(model)
    assert Trace.from_attention(attentions).meta.dtype == (
        "float32" if dtype == torch.float64 else str(dtype).removeprefix("torch.")
    )
    tolerance = {torch.bfloat16: 0.06, torch.float16: 4e-3, torch.float64: 1e-6}[dtype]  # logits are rounded there
    for index, rows in enumerate(attentions):
        np.testing.assert_allclose(softmax_of(trace, index), rows[0].float(), atol=tolerance)


@pytest.mark.parametrize("name", OTHERWISE)
def test_attention_of_another_kind_is_refused(name):
    model = build(OTHERWISE[name])
    with pytest.raises(TraceError, match="from_attention") as refused:
        record(model, TOKENS)
    assert "\n" not in str(refused.value)
    record(build(MODELS["llama"]), TOKENS)  # and nothing is left behind


@pytest.mark.parametrize("tokens", [[], [[1, 2], [3, 4]], [1.0, 2.0], "text", None, [True, False]])
def test_one_text(tokens):
    with pytest.raises(TraceError, match=r"^tokens must be the ids of one text, \[steps\] or \[1, steps\], not "):
        record(build(MODELS["llama"]), tokens)
    with pytest.raises(TraceError, match="^model must be a model of transformers, not 'llama'"):
        record("llama", TOKENS)


@pytest.mark.filterwarnings("ignore:.*does not support .output_attentions")
def test_what_other_implementations_return():
    with pytest.raises(TraceError, match="load it with attn_implementation='eager'"):
        Trace.from_attention(attentions_of(build(MODELS["llama"], "sdpa")))
    model = build(MODELS["llama"]).eval()
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    made = model.generate(torch.tensor(TOKENS)[None], pad_token_id=0, **options)
    with pytest.raises(TraceError, match=r"as transformers' generate\(\) returns them"):
        Trace.from_attention(made.attentions)
