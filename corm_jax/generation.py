"""Prefill, decode, generation. Two compiled programs serve every prompt: one block of prefill, one stretch of decoding.

Prompts are read in blocks of fixed size, the last one padded; inside a block `jax.lax.scan` goes through the chunks
between which the policy evicts. Decoding is a `jax.lax.scan` over tokens. Caches are donated: updated in place.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from corm_jax import cache
from corm_jax.errors import CacheOverflowError, CormError
from corm_jax.model import Llama
from corm_jax.types import Caches, Capacity, Policy, broadcasts, iota

BLOCK = 256
"""Tokens that go through the model at once, rounded up to a multiple of the chunk. Does not change results."""

STRETCH = 16
"""Tokens decoded between two returns to the host."""

Overflow = str  # "evict" or "error"
Policies = Policy | Sequence[Policy]


class Blocks(NamedTuple):
    """Prompts cut for reading: ``tokens [batch, blocks, block]``, and ``count [blocks, batch]`` real tokens in each."""

    tokens: np.ndarray
    count: np.ndarray

    @classmethod
    def cut(cls, prompts: Sequence[Sequence[int]], vocab: int, chunk: int) -> "Blocks":
        """Pads prompts on the right and cuts them.

        Raises:
          CormError: for no prompt, an empty prompt, an id outside the vocabulary, or a chunk below 1.
        """
        if chunk < 1:
            raise CormError(f"chunk must be at least 1, not {chunk}")
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise CormError("a prompt is empty: give each at least one token")
        for prompt in prompts:
            if min(prompt) < 0 or max(prompt) >= vocab:
                outside = next(token for token in prompt if not 0 <= token < vocab)
                raise CormError(
                    f"token id {outside} is outside the vocabulary of {vocab}: is this the right tokenizer?"
                )
        size = -(-BLOCK // chunk) * chunk
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        blocks = -(-int(lengths.max()) // size)
        tokens = np.zeros((len(prompts), blocks * size), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        count = np.clip(lengths[None] - size * np.arange(blocks)[:, None], 0, size).astype(np.int32)
        return cls(tokens.reshape(len(prompts), blocks, size), count)


class Generation(NamedTuple):
    """New tokens of each prompt, without those that end a text, and the caches after them."""

    tokens: list[list[int]]
    caches: Caches


def prefill(
    model: Llama,
    policy: Policies,
    caches: Caches,
    prompts: Sequence[Sequence[int]],
    *,
    chunk: int = 1,
    overflow: Overflow = "evict",
) -> tuple[Float[Array, "batch vocab"], Caches]:
    """Reads prompts of any lengths, each row with its own clock.

    Args:
      caches: as `Llama.make_caches` returns them, or after an earlier call; donated.
      prompts: token ids, one list a row; the whole prompt, for policies that wait for its end.
      chunk: tokens between evictions. 1 is the exact recurrence; more is faster and remembers a little longer.
      overflow: what happens when no slot is free: the policy's lowest rank goes, counted; or `CacheOverflowError`.

    Returns:
      Logits of each row's next token, and the caches.

    Raises:
      CormError: for bad token ids, or a capacity that cannot hold a chunk, or the prompt if the policy keeps all of it.
    """
    blocks = Blocks.cut(prompts, model.config.vocab, chunk)
    lengths = blocks.count.sum(0, dtype=np.int32)
    cache.check_prompt(policy, cache.capacities(caches), int(lengths.max()))
    cache.check_clock(caches, lengths)
    check_overflow(caches, overflow)
    caches = cache.expect(caches, lengths)
    logits = jnp.zeros((len(prompts), model.config.vocab), jnp.float32)
    for index, count in enumerate(blocks.count):
        logits, caches = _prefill_block(model, policy, caches, logits, blocks.tokens[:, index], count, chunk=chunk)
        check_overflow(caches, overflow)
    return logits, caches


@partial(jax.jit, static_argnames="chunk", donate_argnames="caches")
@broadcasts
def _prefill_block(model, policy, caches, logits, tokens, count, *, chunk):
    x, caches, _ = model(policy, caches, tokens, count, chunk=chunk)
    last = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(count[:, None] > 0, model.logits(last), logits), caches


@partial(jax.jit, static_argnames="steps", donate_argnames="caches")
@broadcasts
def decode(
    model: Llama,
    policy: Policies,
    caches: Caches,
    logits: Float[Array, "batch vocab"],
    key: Array,
    done: Bool[Array, " batch"],
    limit: Int[Array, ""],
    end: Int[Array, " ends"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    *,
    steps: int,
) -> tuple[Int[Array, "batch {steps}"], Float[Array, "batch vocab"], Bool[Array, " batch"], Caches]:
    """Draws up to ``steps`` tokens a row, evicting after each: one `jax.lax.scan`.

    Rows that are ``done``, or that have drawn ``limit`` tokens or one of ``end``, stand still: their caches stay as
    they are, and their further tokens are -1.

    Returns:
      Tokens, the logits of the next one, which rows met an end, and the caches.
    """

    def step(carry, xs):
        logits, done, caches = carry
        index, key = xs
        token = sample(logits, key, temperature, top_p)
        reads = ~done & (index < limit)
        x, caches, _ = model(policy, caches, token[:, None], reads.astype(jnp.int32), chunk=1)
        logits = jnp.where(reads[:, None], model.logits(x[:, 0]), logits)
        done = done | (reads & jnp.isin(token, end))
        return (logits, done, caches), jnp.where(reads, token, -1)

    xs = iota(steps), jax.random.split(key, steps)
    (logits, done, caches), tokens = jax.lax.scan(step, (logits, done, caches), xs)
    return tokens.T, logits, done, caches


def sample(
    logits: Float[Array, "batch vocab"], key: Array, temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, " batch"]:
    """Draws a token a row: the likeliest at temperature 0, else among the likeliest that hold ``top_p`` of the mass."""

    def draw(logits):
        scaled = logits / temperature
        ordered = -jnp.sort(-scaled, axis=-1)
        probability = jax.nn.softmax(ordered)
        inside = jnp.cumsum(probability, axis=-1) - probability < top_p  # the likeliest always is
        least = jnp.min(ordered, axis=-1, keepdims=True, where=inside, initial=jnp.inf)
        return jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf)).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, draw, lambda logits: jax.lax.argmax(logits, 1, jnp.int32), logits)


def stream(
    model: Llama,
    policy: Policies,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    capacity: Capacity | None = None,
    pooled: bool = False,
    chunk: int = 1,
    overflow: Overflow = "evict",
    end: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Generation]:
    """`generate`, a stretch of tokens at a time: each item holds the tokens that are new since the last.

    The caches of an item are given up for the next: read what you need from them before going on.
    """
    if max_new_tokens < 1:
        raise CormError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise CormError(f"temperature must be >= 0 and top_p in (0, 1], not {temperature} and {top_p}")
    Blocks.cut(prompts, model.config.vocab, chunk)  # complain before anything is allocated
    length = max(len(prompt) for prompt in prompts) + max_new_tokens
    capacity = cache.slots_for(policy, capacity, length, chunk)
    caches = model.make_caches(policy, batch=len(prompts), capacity=capacity, pooled=pooled)
    logits, caches = prefill(model, policy, caches, prompts, chunk=chunk, overflow=overflow)
    done = jnp.zeros(len(prompts), bool)
    for start in range(0, max_new_tokens, STRETCH):
        tokens, logits, done, caches = decode(
            model,
            policy,
            caches,
            logits,
            jax.random.fold_in(jax.random.key(seed), start),
            done,
            np.int32(max_new_tokens - start),
            np.asarray(end, np.int32),
            np.float32(temperature),
            np.float32(top_p),
            steps=STRETCH,
        )
        check_overflow(caches, overflow)
        new = [[int(token) for token in row if token >= 0 and token not in end] for row in np.asarray(tokens)]
        yield Generation(new, caches)
        if bool(done.all()):
            return


def generate(model: Llama, policy: Policies, prompts: Sequence[Sequence[int]], **options) -> Generation:
    """Continues prompts.

    Args:
      model, policy: what reads, and the rule by which its caches forget.
      prompts: token ids, one list a row; lengths may differ.
      max_new_tokens: the most to draw for each.
      capacity: slots a key-value head, of all layers or of each; by default as many as could ever be needed.
      pooled: whether the heads of a layer share their slots, so that each takes what it needs.
      chunk, overflow: how the prompt is read, see `prefill`.
      end: ids after which a row stops, usually ``tokenizer.end``.
      temperature, top_p, seed: see `sample`; greedy by default.

    Raises:
      CormError: for options out of range, empty prompts or token ids outside the vocabulary.
    """
    pieces = list(stream(model, policy, prompts, **options))
    tokens = [[token for piece in pieces for token in piece.tokens[row]] for row in range(len(prompts))]
    return Generation(tokens, pieces[-1].caches)


def check_overflow(caches: Caches, overflow: Overflow) -> None:
    """Raises if keys went for want of a slot and the caller wants to know."""
    if overflow not in ("evict", "error"):
        raise CormError(f"overflow must be 'evict' or 'error', not {overflow!r}")
    if overflow == "error":
        lost = [int(one.overflow.sum()) for one in caches]
        if sum(lost):
            layer = next(layer for layer, number in enumerate(lost) if number)
            capacity = cache.capacities(caches)[layer]
            raise CacheOverflowError(
                f"layer {layer} ran out of its {capacity} slots a head: raise capacity, or let it evict"
            )
