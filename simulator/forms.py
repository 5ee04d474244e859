"""The form of the attention of a trace's layers, for JAX and for the specification, and the policy of each layer."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from corm_jax.core.form import Form
from corm_jax.core.policy import Policy
from corm_jax.core.positions import ALiBi
from corm_jax.policies import of_layers
from corm_jax.traces.meta import Meta
from simulator import reading


def form_of(meta: Meta, layer: int) -> Form:
    """The form of a layer, with ``scale`` 1 for rows of attention, whose logits are logarithms."""
    slopes = None if meta.slopes is None else ALiBi(slopes_by_head(meta))
    cap = None if meta.softcap is None else jnp.float32(meta.softcap)
    window = _window(meta, layer)
    return Form(slopes, jnp.float32(meta.scale or 1), cap, None if window is None else jnp.int32(window))


def in_numpy(meta: Meta, layer: int) -> reading.Form | None:
    """The form of a layer for `simulator.reading`, but for the scale; None for no more than a scale."""
    window = _window(meta, layer)
    if window is None and meta.slopes is None and meta.softcap is None:
        return None
    slopes = None if meta.slopes is None else slopes_by_head(meta).tolist()
    return reading.Form(softcap=meta.softcap, slopes=slopes, window=math.inf if window is None else window)


def policies_of(meta: Meta, policy: Policy | Sequence[Policy]) -> tuple[Policy, ...]:
    """The policy of each layer: `corm_jax.Window` of local layers, that asked for of the others."""
    return of_layers(policy, meta.layers, meta.windows or ())


def global_layers(meta: Meta) -> list[int]:
    """The numbers of the layers without a window."""
    return [layer for layer in range(meta.layers) if layer not in meta.local]


def _window(meta: Meta, layer: int) -> int | None:
    return meta.windows[layer] if meta.windows else None


def slopes_by_head(meta: Meta) -> np.ndarray:
    """The slopes ``[kv_heads, group]``; zeros without a bias."""
    if meta.slopes is None:
        return np.zeros((meta.kv_heads, meta.group), np.float32)
    return np.asarray(meta.slopes, np.float32).reshape(meta.kv_heads, meta.group)
