"""Causal language models of ``keras_hub`` on JAX, with random weights."""

import os

import jax
import numpy as np
import pytest

from corm_jax import CormError
from corm_jax.adapters.keras_hub import decoder
from corm_jax.runs.recording import record
from tests.decoders import IDS, TOKENS, VOCAB, check

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages
os.environ["KERAS_BACKEND"] = "jax"
keras_hub = pytest.importorskip("keras_hub", reason="needs pip install 'corm-jax[adapters]'")

GROUPED = {"num_query_heads": 4, "num_key_value_heads": 2}
BACKBONES = {
    "Llama3": GROUPED,
    "Gemma": GROUPED | {"head_dim": 8, "attention_logit_soft_cap": 5.0, "final_logit_soft_cap": 30.0,
                        "use_sliding_window_attention": True, "sliding_window_size": 6},
    "Qwen3": GROUPED | {"head_dim": 8, "tie_word_embeddings": True},
    "GPT2": {"num_heads": 4},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _promotes():
    """Other packages rely on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", BACKBONES)
def test_a_causal_language_model(name):
    shape = {"vocabulary_size": VOCAB, "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 48}
    rng = np.random.default_rng(1)
    backbone = getattr(keras_hub.models, f"{name}Backbone")(**shape, **BACKBONES[name])
    model = getattr(keras_hub.models, f"{name}CausalLM")(backbone=backbone, preprocessor=None)
    for weight in model.weights:
        if "float" in weight.dtype:
            weight.assign(0.3 * rng.normal(size=weight.shape))
    logits = np.asarray(model({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))
    adapted = decoder(model)
    check(adapted, logits)
    assert [one.q.shape for one in record(adapted, IDS[0].tolist())] == [(TOKENS, 4, 8)] * 2
    assert [one for one in adapted.config.windows if one] == ([6] if name == "Gemma" else [])


def test_a_model_that_has_no_place_for_other_attention_is_named():
    shape = {"vocabulary_size": VOCAB, "num_layers": 1, "hidden_dim": 32, "intermediate_dim": 48}
    backbone = keras_hub.models.FalconBackbone(**shape, num_attention_heads=4)
    model = keras_hub.models.FalconCausalLM(backbone=backbone, preprocessor=None)
    with pytest.raises(CormError, match="FalconTransformerDecoder of keras_hub has no place for other attention"):
        next(record(decoder(model), IDS[0].tolist()))
