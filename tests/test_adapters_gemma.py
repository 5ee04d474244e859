"""Gemma 2 and 3 as ``gemma`` has them, with random weights: windows, soft caps, norms, two rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import CormError
from corm_jax.adapters.gemma import decoder
from corm_jax.runs.recording import record
from tests.decoders import IDS, VOCAB, check

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages
gm = pytest.importorskip("gemma.gm", reason="needs pip install 'corm-jax[adapters]'")


@pytest.fixture(autouse=True)
def _promotes():
    """Other packages rely on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def model(local, kv_heads, **options):
    """A small one, with its parameters."""
    kinds = gm.nn.AttentionType
    shape = {"embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 16, "num_kv_heads": kv_heads}
    config = gm.nn.config.TransformerConfig(
        num_embed=VOCAB,
        **shape,
        attention_types=(kinds.LOCAL_SLIDING if local else kinds.GLOBAL, kinds.GLOBAL, kinds.GLOBAL),
        sliding_window_size=6,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        local_base_frequency=100,
        **options,
    )
    one, rng = gm.nn.Transformer(config=config, dtype=jnp.float32), np.random.default_rng(0)
    drawn = jax.eval_shape(one.init, jax.random.key(0), IDS)["params"]
    return one, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), drawn)


def test_gemma_2():
    """Soft caps of attention and of logits, a sliding window, a scale of its own."""
    scale = gm.nn.config.QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
    caps = {"attn_logits_soft_cap": 5.0, "final_logit_softcap": 30.0, "query_pre_attn_norm": scale}
    one, params = model(local=True, kv_heads=2, **caps)
    adapted = decoder(one, params)
    check(adapted, np.asarray(one.apply({"params": params}, IDS).logits))
    assert adapted.config.windows == (6, None, None)
    assert [one.layer for one in record(adapted, IDS[0].tolist())] == [0, 1, 2]


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_gemma_3(kv_heads):
    """Norms of queries and keys, and a second rotation in the local layer; one key-value head, and one for each."""
    one, params = model(
        local=True, kv_heads=kv_heads, use_qk_norm=True, global_scale_factor=8.0, final_logit_softcap=None
    )
    check(decoder(one, params), np.asarray(one.apply({"params": params}, IDS).logits))


def test_another_model_is_named():
    with pytest.raises(CormError, match="takes a Transformer of gemma.gm.nn, not a dict"):
        decoder({}, {})
