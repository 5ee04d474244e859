"""Qwen3 of jax-ml's ``bonsai``.

A layer runs as it is, but for its attention, whose projections, norms and rotation are done with its own modules.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial

from corm_jax.adapters.functions import Functions
from corm_jax.model.decoder import Shape


def decoder(model: Any, *, context: int = 40960) -> Functions:
    """A `corm_jax.Decoder` of a ``bonsai.models.qwen3.modeling.Qwen3``, in the dtype of its parameters.

    >>> model = bonsai.models.qwen3.modeling.Qwen3.from_pretrained("Qwen/Qwen3-0.6B")     # doctest: +SKIP
    >>> cj.generate(decoder(model), cj.Corm(window=256), prompts, max_new_tokens=64)      # doctest: +SKIP
    """
    config = model.config
    heads = {"heads": config.num_heads, "kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    return Functions(
        Shape(vocab=config.vocab_size, layers=config.num_layers, **heads, context=context),
        Partial(_embed, model.embedder),
        tuple(Partial(_layer, layer) for layer in model.layers),
        Partial(_logits, model.final_norm, model.lm_head),
    )


def _embed(embedder, tokens, position):
    return embedder.embedding[...][tokens]


def _layer(layer, x, position, attend):
    layer = nnx.clone(layer)
    own, layer.attn = layer.attn, nnx.static(None)
    layer.attn = nnx.static(_Attention(own, position, attend))
    return layer(x, None, None)


def _logits(norm, head, x):
    rows = x.reshape(1, -1, x.shape[-1])
    return head(norm(rows)).astype(jnp.float32).reshape(*x.shape[:-1], -1)


@dataclass(frozen=True, eq=False)
class _Attention:
    """In the place of a layer's attention."""

    own: Any
    position: Any
    attend: Any

    def __call__(self, x, cache, segments):
        from bonsai.models.qwen3.modeling import _generate_pos_embeddings, apply_rope

        own, angles = self.own, _generate_pos_embeddings(self.position, self.own.head_dim)
        q, k = own.q_norm(own.q_proj(x)), own.k_norm(own.k_proj(x))
        q, k = (apply_rope(one, *angles) for one in (q, k))
        return own.o_proj(self.attend(q, k, own.v_proj(x), scale=own.scale))
