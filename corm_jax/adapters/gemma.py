"""Gemma 2 and 3 of the package ``gemma``, text only.

Each block runs as it is, except for its attention: the block's own modules compute projections, norms of queries and
keys, and rotation; `corm_jax.model.decoder.Attend` does the rest, with the scale, soft cap and window of the block.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen
from jax.tree_util import Partial

from corm_jax.adapters.functions import Functions, with_windows
from corm_jax.errors import CormError
from corm_jax.model.decoder import Shape


def decoder(model: Any, params: Any, *, context: int = 8192) -> Functions:
    """A `corm_jax.Decoder` of a model of ``gemma``.

    Args:
      model: a ``gm.nn.Transformer``, such as ``gm.nn.Gemma3_270M()``.
      params: its parameters, as ``gm.ckpts.load_params`` returns them.
      context: positions that it was trained on.

    Raises:
      CormError: for a model of another kind.
    """
    from gemma import gm

    if not isinstance(model, gm.nn.Transformer):
        raise CormError(f"this adapter takes a Transformer of gemma.gm.nn, not a {type(model).__name__}")
    config, outside = model.config, {name: params[name] for name in ("embedder", "final_norm")}
    heads = {"heads": config.num_heads, "kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    blocks = [block.clone(name=None, parent=None) for block in model.bind({"params": params}).blocks]
    made = Functions(
        Shape(vocab=config.num_embed, layers=config.num_layers, **heads, context=context),
        Partial(partial(model.apply, method=_embed), {"params": outside}),
        tuple(Partial(_Block(block), {"params": params[f"layer_{i}"]}) for i, block in enumerate(blocks)),
        Partial(partial(model.apply, method=_logits), {"params": outside}),
    )
    return with_windows(made)


def _embed(model, tokens, position):
    return model.embedder.encode(tokens)


def _logits(model, x):
    logits, cap = model.embedder.decode(model.final_norm(x)), model.config.final_logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


@dataclass(frozen=True)
class _Block:
    """A block without parameters. Equal blocks share a compiled program."""

    block: linen.Module

    def __call__(self, variables, x, position, attend):
        from gemma import gm

        def intercept(proceed, args, options, context):
            if isinstance(context.module, gm.nn.Attention) and context.method_name == "__call__":
                return None, _attention(context.module, args[0], position, attend)
            return proceed(*args, **options)

        with linen.intercept_methods(intercept):
            return self.block.apply(variables, x, position, None, None)[1]


def _attention(own, x, position, attend):
    from gemma import gm
    from gemma.gm.math._positional_embeddings import apply_rope

    if own.use_qkv_einsum:
        q, k, v = own.qkv_einsum("BTD,SNDH->SBTNH", x)
    else:
        q, (k, v) = own.q_einsum("BTD,NDH->BTNH", x), own.kv_einsum("BSD,CKDH->CBSKH", x)
    if own.use_qk_norm:
        q, k = own._query_norm(q), own._key_norm(k)
    rope = partial(apply_rope, base_frequency=own.rope_base_frequency, scale_factor=own.rope_scale_factor)
    window = own.sliding_window_size if own.attn_type == gm.nn.AttentionType.LOCAL_SLIDING else None
    form = {"scale": own.query_pre_attn_scalar, "softcap": own.attn_logits_soft_cap, "window": window}
    return own.attn_vec_einsum("BTNH,NHD->BTD", attend(rope(q, position), rope(k, position), v, **form))
