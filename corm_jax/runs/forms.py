"""The form of a model's attention, as a trace states it beside queries, keys and values.

Queries and keys are recorded as they meet, with rotation and scale in them. What else there is to the logits, a soft
cap and a bias, and which keys a query sees, are arguments that a layer passes to `corm_jax.model.decoder.Attend`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from corm_jax.core.arrays import iota
from corm_jax.core.form import Form
from corm_jax.core.layout import Apart
from corm_jax.core.options import shown
from corm_jax.errors import CormError
from corm_jax.model.decoder import Decoder, windows_of


class Written(NamedTuple):
    """The fields of `corm_jax.traces.meta.Meta` that state a form."""

    softcap: float | None
    slopes: tuple[float, ...] | None
    windows: tuple[int | None, ...]


def written(model: Decoder, tokens: int) -> Written:
    """The form of a model's attention, which each layer passes on when it is called with one token.

    Args:
      tokens: how many will be read, so that a bias is looked at for all distances between them.

    Raises:
      CormError: names the layer and the part that a trace has no place for: a mask, a bias that is no slope times the
        distance, a soft cap or slopes of its own in some layer, or another window than the config states.

    >>> from corm_jax import Config, Transformer
    >>> from flax import nnx
    >>> config = Config(vocab=100, dim=32, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=8)
    >>> written(Transformer(config, rngs=nnx.Rngs(0)), 16)
    Written(softcap=None, slopes=None, windows=(None, None))
    """
    zero, said = jnp.zeros((1, 1), jnp.int32), windows_of(model.config)
    x, found = model.embed(zero, zero), []
    for index, layer in enumerate(model.layers):
        found.append(_of_layer(f"layer {index}", layer, x, zero, model.config, tokens))
        window = found[-1].windows[0]
        if window != said[index]:
            raise CormError(
                f"layer {index} attends with window={window}, and config.windows says {said[index]} there: a trace is "
                "replayed with the window that the model's cache has, so state it in the Shape"
            )
        for name in ("softcap", "slopes"):
            own, first = (getattr(one, name) for one in (found[-1], found[0]))
            if own != first:
                raise CormError(
                    f"layer {index} attends with {name}={shown(own)}, and layer 0 with {shown(first)}: a trace has one "
                    "for all layers"
                )
    return Written(found[0].softcap, found[0].slopes, said)


def _of_layer(where: str, layer: Any, x: Any, position: Any, config: Any, tokens: int) -> Written:
    found: list[Form] = []

    def attend(q, k, v, encoding=None, **form):
        found.append(Form(encoding, **form))
        return jnp.zeros_like(q)

    layer(x, position, attend)
    if len(found) != 1:
        raise CormError(f"{where} attends {len(found)} times: a layer attends once")
    form = found[0]
    if form.mask is not None:
        raise CormError(f"{where} attends with a mask, for which a trace has no place: only windows are recorded")
    window = None if form.window is None else int(_one(where, "window", form.window))
    softcap = None if form.softcap is None else float(_one(where, "softcap", form.softcap))
    return Written(softcap, _slopes(where, form, config, tokens), (window,))


def _one(where: str, name: str, value: Any) -> np.ndarray:
    found = np.asarray(value)
    if found.ndim:
        raise CormError(f"{where} attends with a {name} of the shape {found.shape}: a trace has one number for a layer")
    return found


def _slopes(where: str, form: Form, config: Any, tokens: int) -> tuple[float, ...] | None:
    """The slope of each query head, of a bias that is minus a slope times the distance; None for no bias."""
    if form.encoding is None:
        return None
    form.encoding.check(config.kv_heads, config.heads // config.kv_heads, config.head_dim)
    distance = iota(max(tokens, 2))[:, None, None]
    bias = form.encoding.bias(distance, Apart())
    if bias is None:
        return None
    shape = config.heads // config.kv_heads, len(distance), config.kv_heads
    by_head = np.broadcast_to(np.asarray(bias)[..., 0], shape).transpose(2, 0, 1).reshape(config.heads, -1)
    slopes = -by_head[:, 1]
    if not np.allclose(by_head, -slopes[:, None] * np.arange(len(distance)), rtol=1e-5, atol=1e-6):
        raise CormError(
            f"{where} adds the bias of {type(form.encoding).__name__}, which is no slope times the distance, as "
            "that of ALiBi is: a trace has no place for it"
        )
    return tuple(slopes.tolist())
