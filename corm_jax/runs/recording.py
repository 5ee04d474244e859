"""Recording: what every layer attends to while the model reads a text with the full cache.

The whole text is read by one layer, then by the next. So memory holds the hidden states of the text, and the queries,
keys, values and the cache of a single layer, however many layers there are.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from corm_jax.core.cache import make_cache
from corm_jax.core.types import CacheSpec
from corm_jax.errors import CormError
from corm_jax.files import whole_file
from corm_jax.model.decoder import Decoder, check_length, hidden, through
from corm_jax.model.generation import Blocks
from corm_jax.policies.recorder import Recorder, recorded
from corm_jax.runs.forms import written


class Recorded(NamedTuple):
    """What is recorded of one layer. All arrays are float32, whatever the dtype of the model.

    Attributes:
      layer: the number of the layer, from 0.
      q: ``[tokens, q_heads, head_dim]``, rotated. Query heads ``h * group`` to ``h * group + group - 1`` share
        key-value head ``h``.
      k, v: ``[tokens, kv_heads, head_dim]``, the keys rotated.
      x: ``[tokens, dim]``, the hidden states that leave the layer.
    """

    layer: int
    q: Float[np.ndarray, "tokens q_heads head_dim"]
    k: Float[np.ndarray, "tokens kv_heads head_dim"]
    v: Float[np.ndarray, "tokens kv_heads head_dim"]
    x: Float[np.ndarray, "tokens dim"]


def record(
    model: Decoder,
    tokens: Sequence[int],
    *,
    x: Float[np.ndarray, "tokens dim"] | None = None,
    first: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Recorded]:
    """Reads a text layer by layer with the full cache, and yields what each layer attends to.

    What else there is to the form of the attention is `corm_jax.runs.forms.written`.

    Args:
      tokens: ids, at least one.
      x: the hidden states that enter layer ``first``, as an earlier recording yielded them; by default the embedded
        tokens, which enter layer 0.
      first: the layer to begin with.
      progress: called with the tokens read so far, summed over layers: ``layers * len(tokens)`` at the end.

    Raises:
      CormError: for no tokens, ids outside the vocabulary, or ``x`` of another shape; before the text is read, for
        attention of a form that a trace cannot state.

    >>> from corm_jax import Config, Transformer
    >>> from flax import nnx
    >>> config = Config(vocab=100, dim=32, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=8)
    >>> model = Transformer(config, rngs=nnx.Rngs(0))
    >>> [(one.layer, one.q.shape, one.k.shape) for one in record(model, [3, 1, 4, 1, 5])]
    [(0, (5, 4, 8), (5, 2, 8)), (1, (5, 4, 8), (5, 2, 8))]
    """
    config, length = model.config, len(tokens)
    check_length(config, length)
    blocks = Blocks.cut([tokens], config.vocab, chunk=1)
    number, block = blocks.tokens.shape[1:]
    dim, dtype = hidden(model).shape[-1], hidden(model).dtype
    if x is None and first == 0:
        position = np.arange(number * block, dtype=np.int32).reshape(number, block)
        x = np.asarray(model.embed(jnp.asarray(blocks.tokens[0]), jnp.asarray(position)), np.float32)
        x = x.reshape(number * block, dim)[:length]
    if x is None or x.shape != (length, dim):
        shape = None if x is None else x.shape
        raise CormError(f"x, which enters layer {first}, must have the shape {(length, dim)}, not {shape}")
    written(model, length)
    recorder = Recorder(group=config.heads // config.kv_heads, form="beside")
    spec = CacheSpec(config.kv_heads, number * block, config.head_dim, dtype)
    padded = np.zeros((number, 1, block, dim), np.float32)
    padded.reshape(-1, dim)[:length] = x
    progress(first * length)
    for index in range(first, config.layers):
        cache = make_cache(recorder, spec, batch=1)
        for at, count in enumerate(blocks.count):
            entering = jnp.asarray(padded[at], dtype)
            leaving, cache = _layer(model.layers[index], recorder, cache, entering, count)
            padded[at] = leaving
            progress(index * length + at * block + int(count[0]))
        yield Recorded(index, *recorded(cache), padded.reshape(-1, dim)[:length].copy())


def resume(
    model: Decoder,
    tokens: Sequence[int],
    state: Path,
    done: int,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Recorded]:
    """Goes on with a recording after its first ``done`` layers. The caller stores each layer before it takes the next.

    The hidden states that leave a layer are written to the file ``state`` once the caller has stored the layer. After
    an interruption the file may be missing, or hold those of an earlier layer. Then some layers that are stored are
    computed once more, and are not yielded.

    Raises:
      CormError: as `record`, and if ``state`` cannot be written.
    """
    first, x = _load(state, (len(tokens), hidden(model).shape[-1]), done)
    if done == model.config.layers:
        return
    for one in record(model, tokens, x=x, first=first, progress=progress):
        if one.layer >= done:
            yield one
        _save(state, one.layer + 1, one.x)


@partial(jax.jit, donate_argnames="cache")
def _layer(layer, recorder, cache, x, count):
    return through(layer, x, cache, recorder, count, chunk=x.shape[1])[:2]


def _save(state: Path, layers: int, x: np.ndarray) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with whole_file(state) as temporary:
            save_file({"layers": np.array(layers), "x": x}, temporary)
    except (OSError, SafetensorError) as error:
        raise CormError(f"cannot write {state}: {error}") from None


def _load(state: Path, shape: tuple[int, int], most: int) -> tuple[int, np.ndarray | None]:
    """The hidden states in ``state``, after the number of layers that they went through; 0 and None if unusable."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(state)
        layers, x = int(found["layers"]), found["x"]
    except (OSError, SafetensorError, KeyError, TypeError):
        return 0, None
    return (layers, x) if 0 < layers <= most and x.shape == shape and x.dtype == np.float32 else (0, None)
