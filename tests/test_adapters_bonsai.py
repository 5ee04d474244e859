"""Qwen3 of jax-ml's bonsai, which is not on PyPI: these tests run where it is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from corm_jax.adapters.bonsai import decoder
from tests.decoders import IDS, TOKENS, VOCAB, check

qwen3 = pytest.importorskip("bonsai.models.qwen3.modeling", reason="needs a clone of jax-ml/bonsai")


@pytest.fixture(autouse=True)
def _promotes():
    """Other packages rely on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.filterwarnings("ignore")
def test_qwen3():
    shape = {"num_layers": 2, "vocab_size": VOCAB, "emb_dim": 32, "mlp_dim": 48}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    rope = {"rope_theta": 1_000_000, "rope_scaling_factor": 8.0, "local_rope_theta": 1e4}
    config = qwen3.ModelConfig(**shape, **heads, **rope, norm_eps=1e-6, tie_word_embeddings=False)
    model, rng = qwen3.Qwen3(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    model = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), model)
    cache = qwen3.init_cache(config, 2, TOKENS, 0, jnp.float32)
    check(decoder(model), np.asarray(model(IDS, cache=cache, segment_ids=jnp.ones_like(IDS))))
