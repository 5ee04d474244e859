"""Arguments that are refused at the door: shapes, dtypes, counts and token ids that cannot be.

What depends on shapes is checked while a program is traced, and costs nothing when it runs. Values are checked where
they can be looked at.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from corm_jax.core import cache as cache_lib
from corm_jax.core.form import Form
from corm_jax.core.options import concrete, numbers_of, shown
from corm_jax.core.policy import Policy, check_policy
from corm_jax.core.positions import Encoding
from corm_jax.core.types import Caches, CacheSpec, LayerCache
from corm_jax.core.wrapper import name_of
from corm_jax.errors import CormError

Tokens: TypeAlias = Sequence[int] | Sequence[np.integer] | Sequence[jax.Array] | np.ndarray | jax.Array
"""The token ids of one text."""

Prompts: TypeAlias = Sequence[Tokens] | np.ndarray | jax.Array
"""The token ids of several texts, one a row."""


def check_step(policy: Policy, cache: LayerCache, q: Any, k: Any, v: Any, count: Any, form: Form) -> Int[Array, ""]:
    """Raises unless these are arguments for `corm_jax.step`. Returns the count, between 0 and the number of tokens."""
    check_policy(policy)
    check_cache(cache, batch=None)
    spec, axes = (
        cache_lib.spec(cache),
        {"q": "[tokens, kv_heads, group, head_dim]", "k": "[tokens, kv_heads, head_dim]"},
    )
    for name, x in {"q": q, "k": k, "v": v}.items():
        names = axes.get(name, axes["k"])
        shape = getattr(x, "shape", None)
        if shape is None or not hasattr(x, "dtype"):
            raise CormError(f"{name} must be an array {names}, not a {type(x).__name__}")
        if len(shape) != names.count(",") + 1:
            raise CormError(f"{name} must be {names}, got the shape {shape}; for a batch, jax.vmap")
        if shape[1] != spec.kv_heads or shape[-1] != spec.head_dim or 0 in shape:
            raise CormError(
                f"{name} must be {names}, got the shape {shape} for a cache of kv_heads={spec.kv_heads} and "
                f"head_dim={spec.head_dim}"
            )
        if shape[0] != q.shape[0]:
            raise CormError(f"{name} must be {names}, got the shape {shape} with queries of {q.shape[0]} tokens")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise CormError(f"{name} must hold floating-point numbers, not {x.dtype}")
    _check_form(policy, form, spec, q.shape[2])
    cache_lib.check_heads(policy, spec)
    cache_lib.check_protected(policy, spec, cache.made)
    _check_state(policy, cache)
    if cache.made and spec.kv_heads < cache.made.kv_heads and not policy.traits.independent:
        raise CormError(
            f"{name_of(policy)} looks at all {cache.made.kv_heads} key-value heads of a layer, and here are "
            f"{spec.kv_heads} of them: split the batch over the devices, or let jax.jit split the heads"
        )
    return _count(count, (), q.shape[0])


def check_cache(cache: Any, batch: int | None) -> None:
    """Raises unless this is the cache of a layer, of one sequence or of a batch of so many rows."""
    if not isinstance(cache, LayerCache):
        what = "several layers: take each by itself" if isinstance(cache, list | tuple) else type(cache).__name__
        raise CormError(f"the cache must be the LayerCache of one layer, as make_cache returns it, not {what}")
    rows = cache_lib.clock_of(cache).seen.shape
    if batch is None and rows:
        raise CormError(f"the cache is one of a batch of {rows[0]}, and the step one of a sequence: use jax.vmap")
    if batch is not None and rows != (batch,):
        found = f"a batch of {rows[0]}" if rows else "one sequence"
        raise CormError(
            f"the caches are of {found}, and there are {batch} rows to read: make caches with batch={batch}"
        )


def check_caches(policies: Sequence[Policy], caches: Caches, kv_heads: int, head_dim: int, batch: int) -> None:
    """Raises unless these are a model's caches, one for each policy, of a batch of so many rows."""
    if not isinstance(caches, Caches):
        raise CormError(f"the caches of a model are Caches, as make_caches returns them, not {type(caches).__name__}")
    if len(caches) != len(policies):
        raise CormError(f"there are caches for {len(caches)} layers, and the model has {len(policies)}: make new ones")
    for layer, (policy, cache) in enumerate(zip(policies, caches, strict=True)):
        check_cache(cache, batch)
        found = cache.overflow.shape[-1], cache.k.shape[-1]
        if found != (kv_heads, head_dim):
            raise CormError(
                f"the cache of layer {layer} is for {found[0]} key-value heads of {found[1]} numbers, the model has "
                f"{kv_heads} of {head_dim}: make caches for this model"
            )
        check_policy(policy)
        spec = CacheSpec(kv_heads, cache.position[0].size // kv_heads, head_dim, cache.k.dtype, cache.position.shape[1])
        cache_lib.check_heads(policy, spec)
        cache_lib.check_protected(policy, spec, cache.made)


def check_count(count: Any, rows: int, tokens: int) -> Int[Array, " batch"]:
    """How many tokens of each row are real, between 0 and the number there is room for."""
    return _count(count, (rows,), tokens)


def check_batch(name: str, x: Any, *shape: int) -> None:
    """Raises unless an array has this shape."""
    if np.shape(x) != shape:
        raise CormError(f"{name} must have the shape {shape}, got {np.shape(x)}")


def prompts_of(prompts: Any, vocab: int) -> list[np.ndarray]:
    """Prompts as int32 arrays, one a row: of lists, arrays, or one array ``[batch, tokens]``.

    Raises:
      CormError: for no prompt, an empty one, one where several are expected, or what `token_ids` refuses.
    """
    if hasattr(prompts, "__array__"):
        if np.ndim(prompts) < 2 and np.asarray(prompts).dtype != object:
            raise CormError("prompts must be several, one a row, not the ids of one text: give [ids]")
    elif not isinstance(prompts, list | tuple):
        raise CormError(f"prompts must be a list with the token ids of each, not {shown(prompts)}")
    if not len(prompts):
        raise CormError("a prompt is empty: give at least one, of at least one token")
    first = None if isinstance(prompts[0], list | tuple) else numbers_of(prompts[0])
    if first is not None and not first.ndim:
        raise CormError("prompts must be several, one a row, not the ids of one text: give [ids]")
    rows = [token_ids(prompt, vocab) for prompt in prompts]
    if not all(map(len, rows)):
        raise CormError("a prompt is empty: give each at least one token")
    return rows


def token_ids(tokens: Any, vocab: int) -> np.ndarray:
    """The token ids of one text as an int32 array.

    Raises:
      CormError: for anything but whole numbers in the vocabulary, in one row.
    """
    if isinstance(tokens, Tracer):
        raise CormError("token ids are read on the host: inside of jax.jit call the model itself")
    if isinstance(tokens, str | bytes):
        raise CormError(f"token ids are whole numbers, not text such as {shown(tokens)}: encode it with the tokenizer")
    if isinstance(tokens, list | tuple):
        if any(isinstance(one, bool | np.bool_) for one in tokens):
            raise CormError("token ids are whole numbers, not truth values")
    elif not hasattr(tokens, "__array__"):
        raise CormError(f"token ids must be a list or an array of whole numbers, not {shown(tokens)}")
    try:
        found = np.asarray(tokens)
    except (TypeError, ValueError, OverflowError):
        found = np.asarray(None)
    if found.size == 0 and found.ndim == 1:
        return np.zeros(0, np.int32)
    if found.ndim != 1:
        raise CormError(f"the token ids of one text must be one row, not of shape {found.shape}: {shown(tokens)}")
    if not jnp.issubdtype(found.dtype, jnp.integer):
        wrong = next((one for one in tokens if not isinstance(one, int | np.integer)), found[0])
        raise CormError(f"token ids are whole numbers, not {shown(wrong)}")
    outside = (found < 0) | (found >= vocab)
    if outside.any():
        raise CormError(
            f"token id {found[outside][0]} is outside the vocabulary of {vocab}: is this the right tokenizer?"
        )
    return found.astype(np.int32)


def _check_form(policy: Policy, form: Form, spec: CacheSpec, group: int) -> None:
    """Raises unless attention can have this form."""
    if form.encoding is not None:
        if not isinstance(form.encoding, Encoding):
            raise CormError(
                f"encoding must be how positions enter, such as Rotary(frequencies), not {shown(form.encoding)}"
            )
        form.encoding.check(spec.kv_heads, group, spec.head_dim)
    elif policy.traits.positions == "cache":
        raise CormError(
            f"{name_of(policy)} counts positions within the cache: give an encoding such as Rotary(frequencies), and q "
            "and k without positions"
        )
    for name in ("scale", "softcap", "window"):
        value, number = getattr(form, name), numbers_of(getattr(form, name))
        kind, what = (jnp.integer, "a whole number") if name == "window" else (jnp.number, "a number")
        if value is None:
            continue
        if number is None or number.shape or not jnp.issubdtype(number.dtype, kind):
            raise CormError(f"{name} must be {what}, not {shown(value)}")
        if concrete(number) and not 0 < number < np.inf:
            raise CormError(f"{name} must be {what} above 0, not {shown(value)}")
    if form.mask is not None and not callable(form.mask):
        raise CormError(f"mask must be a function of the positions of queries and keys, not {shown(form.mask)}")
    if policy.traits.plain and form.beyond:
        raise CormError(
            f"{name_of(policy)} is for softmax(q . k) over all earlier keys, and this attention has a "
            f"{' and a '.join(form.beyond)}: take another policy"
        )


def _check_state(policy: Policy, cache: LayerCache) -> None:
    """Raises unless the cache was made for the policy, and knows where the prompt ends if the policy waits for it."""
    made, name = cache.made, name_of(policy)
    wanted = jax.eval_shape(lambda: policy.init(cache_lib.spec(cache)))
    if made and made.policy != cache_lib.remembers(policy) and jax.tree.leaves(wanted):
        raise CormError(
            f"the cache was made for {made.policy}, and {name} cannot go on from its state: make one with "
            "make_cache(policy, spec)"
        )
    found, expected = (
        [(np.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(state)] for state in (cache.state, wanted)
    )
    if found != expected or jax.tree.structure(cache.state) != jax.tree.structure(wanted):
        raise CormError(
            f"the cache holds a state of {_shapes(found)}, and {name} keeps {_shapes(expected)}: make one with "
            "make_cache(policy, spec)"
        )
    if (policy.traits.positions == "cache") != (cache.place is not None):
        here, there = ("the cache", "the text") if cache.place is None else ("the text", "the cache")
        raise CormError(
            f"the cache was made for positions within {there}, and {name} counts them within {here}: make one with "
            "make_cache(policy, spec)"
        )
    if policy.traits.whole_prompt and cache_lib.clock_of(cache).stage == "unknown":
        raise CormError(
            f"{name} waits for the end of the prompt: say how many tokens it has, with "
            "cache = corm_jax.begin_prompt(cache, tokens), before they are read"
        )


def _count(count: Any, shape: tuple[int, ...], tokens: int) -> Any:
    found = numbers_of(count)
    if found is None or not jnp.issubdtype(found.dtype, jnp.integer) or found.shape != shape:
        what = "one whole number" if not shape else f"{shape[0]} whole numbers, one a row,"
        raise CormError(f"count must be {what} from 0 to {tokens}, the tokens there are, not {shown(count)}")
    if concrete(found):
        if ((found < 0) | (found > tokens)).any():
            raise CormError(f"count must be from 0 to {tokens}, the tokens there are, not {shown(count)}")
        return jnp.asarray(found, jnp.int32)
    return jnp.clip(found.astype(jnp.int32), 0, tokens)


def _shapes(leaves: Sequence[tuple[tuple[int, ...], Any]]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in leaves) or "nothing"
