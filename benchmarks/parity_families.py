"""Every family of models here and in Hugging Face transformers (torch, CPU): the same logits, through a cache.

    pip install -e ".[test]"; python benchmarks/parity_families.py [--family gemma3]

A tiny model of each family is drawn at random, saved by transformers and read by `corm_jax.load`'s own code. Columns:
the largest difference of any logit over a prompt of 60 tokens (`prefill`), over 20 more tokens read one by one through
the cache of either (`decode`), and how many of all keys CORM keeps in the same text (`corm`, window 12 and recent 4, of
the global layers). Exits with 1 if a difference exceeds 1e-4.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import click
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

import corm_jax as cj
from corm_jax.model import checkpoint
from corm_jax.model.decoder import forward, make_caches

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BOUND = 1e-4
PROMPT, MORE = 60, 20
IDS = np.random.default_rng(0).integers(3, 101, PROMPT + MORE).tolist()
SIZE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
}
GROUPED = SIZE | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [2.0, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
LOCAL = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 16}
ABSOLUTE = {"vocab_size": 101, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512, "initializer_range": 0.25}
BLOOM = {"vocab_size": 101, "hidden_size": 48, "n_layer": 3, "n_head": 6, "initializer_range": 0.25}
OPT = {name: value for name, value in SIZE.items() if name not in ("intermediate_size", "initializer_range")}
OPT |= {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.25}

FAMILIES = {
    "llama": lambda t: t.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "llama, llama3 scaling": lambda t: t.LlamaConfig(**GROUPED, head_dim=16, rope_parameters=LLAMA3),
    "llama, linear scaling": lambda t: t.LlamaConfig(
        **GROUPED, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama, dynamic NTK": lambda t: t.LlamaConfig(
        **GROUPED | {"max_position_embeddings": 128}, rope_parameters=DYNAMIC
    ),
    "llama, YaRN": lambda t: t.LlamaConfig(**GROUPED, rope_parameters=YARN),
    "mistral, windows": lambda t: t.MistralConfig(**GROUPED, sliding_window=16),
    "qwen2": lambda t: t.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen2, windows": lambda t: t.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=16, max_window_layers=2
    ),
    "qwen3": lambda t: t.Qwen3Config(**GROUPED, head_dim=16),
    "phi3, LongRoPE": lambda t: t.Phi3Config(
        **GROUPED, rope_parameters=LONGROPE, original_max_position_embeddings=128, pad_token_id=0, sliding_window=24
    ),
    "phi3, partial": lambda t: t.Phi3Config(**GROUPED, partial_rotary_factor=0.75, pad_token_id=0),
    "gemma2": lambda t: t.Gemma2Config(**GROUPED | LOCAL, attn_logit_softcapping=8.0, final_logit_softcapping=6.0),
    "gemma3": lambda t: t.Gemma3TextConfig(**GROUPED | LOCAL | {"num_hidden_layers": 7}),
    "gpt2": lambda t: t.GPT2Config(**ABSOLUTE),
    "gpt_neox": lambda t: t.GPTNeoXConfig(**SIZE, rotary_pct=0.5),
    "gpt_neox, one after the other": lambda t: t.GPTNeoXConfig(**SIZE, use_parallel_residual=False),
    "opt": lambda t: t.OPTConfig(**OPT),
    "bloom": lambda t: t.BloomConfig(**BLOOM),
}


def theirs(family: str, folder: Path):
    """Transformers' model of a family, its parameters drawn at random, saved to a folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](transformers), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms and biases are drawn, too
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            assert "lm_head" in name or parameter.abs().sum() > 0
    model.save_pretrained(folder)
    return model


def their_logits(model, ids):
    """Those of a prompt read at once, and of the rest read token by token."""
    with torch.no_grad(), warnings.catch_warnings(action="ignore", category=FutureWarning):  # of the cache's new name
        found = model(torch.tensor([ids[:PROMPT]]), use_cache=True)
        cache, logits = found.past_key_values, [found.logits[0]]
        for token in ids[PROMPT:]:
            found = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            logits.append(found.logits[0])
    return torch.cat(logits).numpy()


def our_logits(model, policy, ids, chunk):
    """The same of ours, and the caches; keys are evicted after each ``chunk`` of the prompt."""
    caches = make_caches(model, policy, batch=1, capacity=len(ids), chunk=chunk)
    x, caches, _ = forward(model, policy, caches, jnp.array([ids[:PROMPT]]), jnp.array([PROMPT]), chunk=chunk)
    logits = [model.logits(x[0])]
    for token in ids[PROMPT:]:
        x, caches, _ = forward(model, policy, caches, jnp.array([[token]]), jnp.array([1]), chunk=1)
        logits.append(model.logits(x[0]))
    return np.concatenate(logits), caches


def pair(family: str):
    """The model of a family in transformers, and ours of the same file."""
    with tempfile.TemporaryDirectory() as folder:
        return theirs(family, Path(folder)), checkpoint.build(checkpoint.open_source(folder))


def differences(torchs, model) -> tuple[float, float]:
    """The largest differences of any logit, in the prompt and afterwards."""
    expected = their_logits(torchs, IDS)
    found, _ = our_logits(model, cj.Full(), IDS, chunk=PROMPT)
    difference = np.abs(found - expected).max(-1)
    return float(difference[:PROMPT].max()), float(difference[PROMPT:].max())


def kept(model) -> float:
    """The share of keys that CORM keeps in the global layers; NaN if there are none."""
    _, caches = our_logits(model, cj.Corm(window=12, recent=4), IDS, chunk=1)
    windows = model.config.windows or (None,) * model.config.layers
    live = [int((one.position >= 0).sum()) for one, window in zip(caches, windows, strict=True) if window is None]
    return float(np.mean(live)) / model.config.kv_heads / len(IDS) if live else float("nan")


@click.command()
@click.option("--family", "chosen", multiple=True, help="Only these.  [default: all]")
def main(chosen):
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, float32, {PROMPT} + {MORE} tokens")
    print(f"{'family':32} {'prefill':>9} {'decode':>9} {'corm keeps':>11}")
    worst = 0.0
    for family in chosen or FAMILIES:
        torchs, model = pair(family)
        prefill, decode = differences(torchs, model)
        worst, keeps = max(worst, prefill, decode), kept(model)
        share = "no global" if np.isnan(keeps) else f"{keeps:.2f}"
        print(f"{family:32} {prefill:9.1e} {decode:9.1e} {share:>11}", flush=True)
    print(f"largest difference {worst:.1e}, allowed {BOUND:.0e}")
    sys.exit(worst > BOUND)


if __name__ == "__main__":
    main()
