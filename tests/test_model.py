"""The decoder against an independent one: random tiny Llamas of Hugging Face transformers, on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from corm_jax import Corm, Full
from corm_jax.core.positions import Rope, rotate
from corm_jax.model import checkpoint
from corm_jax.model.decoder import forward, make_caches

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def hugging_face(tmp_path, *, seed=0, shards=None, dtype=torch.float32, **options):
    """A random tiny Llama, saved as Hugging Face saves it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 101,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
            **options,
        }
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    return model


def ours(tmp_path, dtype=jnp.float32):
    return checkpoint.build(checkpoint.open_source(str(tmp_path)), dtype)


def logits_of(model, tokens, policy=None, chunk=1):
    policy = policy or Full()
    caches = make_caches(model, policy, batch=tokens.shape[0], capacity=tokens.shape[1])
    count = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    x, *_ = jax.jit(forward, static_argnames="chunk")(model, policy, caches, tokens, count, chunk=chunk)
    return np.asarray(model.logits(x))


@pytest.mark.parametrize(
    ("kv_heads", "tied", "rope"),
    [(6, True, None), (2, True, None), (2, False, None), (1, False, None), (2, True, LLAMA3), (6, False, LINEAR)],
    ids=["MHA tied", "GQA tied", "GQA untied", "MQA untied", "llama3 rope", "linear rope"],
)
def test_logits_equal_those_of_transformers(tmp_path, kv_heads, tied, rope):
    options = {"rope_parameters": rope} if rope else {}
    theirs = hugging_face(tmp_path, num_key_value_heads=kv_heads, tie_word_embeddings=tied, **options)
    tokens = np.random.default_rng(0).integers(0, 101, (2, 72)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    model = ours(tmp_path)
    assert (model.head is None) == tied
    np.testing.assert_allclose(logits_of(model, tokens), expected, atol=1e-4)
    np.testing.assert_allclose(logits_of(model, tokens, chunk=72), expected, atol=1e-4)
    never = Corm(window=10**6, recent=1)
    np.testing.assert_allclose(logits_of(model, tokens, never, chunk=8), expected, atol=1e-4)


def test_sharded_and_bfloat16_checkpoints(tmp_path):
    hugging_face(tmp_path, shards="20KB", dtype=torch.bfloat16)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = np.random.default_rng(0).integers(0, 101, (1, 40)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits_of(ours(tmp_path), tokens), expected, atol=1e-4)
    with jax.numpy_dtype_promotion("standard"):
        rough = logits_of(ours(tmp_path, jnp.bfloat16), tokens)
    assert np.abs(rough - expected).mean() < 0.05 * np.abs(expected).mean()


def test_rotation_keeps_norms_and_depends_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 8)), jnp.float32) for _ in range(2))
    frequencies = Rope(theta=100.0).frequencies(8)

    def dot(i, j):
        return float((rotate(q, jnp.array([i]), frequencies) * rotate(k, jnp.array([j]), frequencies)).sum())

    np.testing.assert_allclose(dot(105, 100), dot(5, 0), atol=1e-4)
    assert abs(dot(6, 0) - dot(5, 0)) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(rotate(q, jnp.array([9]), frequencies)), jnp.linalg.norm(q), rtol=1e-5)


def test_bfloat16_positions_do_not_blur():
    x = jnp.ones((2, 8), jnp.bfloat16)
    rotated = rotate(x, jnp.array([1000, 1001]), Rope().frequencies(8))
    assert float(jnp.abs(rotated[0] - rotated[1]).max()) > 0.3
