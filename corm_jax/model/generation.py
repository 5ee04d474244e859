"""Prefill, decode, generation. Two compiled programs serve every prompt: one block of prefill, one stretch of decoding.

Prompts are read in blocks of fixed size, the last one padded; inside a block `jax.lax.scan` goes through the chunks
between which the policy evicts. Decoding is a `jax.lax.scan` over tokens. Caches are donated: updated in place.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from corm_jax.core.arguments import Prompts, check_batch, check_caches, prompts_of
from corm_jax.core.arrays import broadcasts, iota
from corm_jax.core.capacity import capacities, per_layer, slots_for
from corm_jax.core.options import integer, one_of, real
from corm_jax.core.prompt import check_clock, check_prompt, end_prompt, set_prompt
from corm_jax.core.types import Caches, Capacity
from corm_jax.errors import CacheOverflowError
from corm_jax.model.decoder import Decoder, Policies, forward, make_caches
from corm_jax.showing.brief import between, leaves, line

TOKENS_PER_BLOCK = 256
"""Tokens that go through the model at once, rounded up to a multiple of the chunk. Does not change results."""

STRETCH = 16
"""Tokens decoded between two returns to the host."""

Overflow = str
OVERFLOW = ("evict", "error")


class Blocks(NamedTuple):
    """Prompts cut for reading: ``tokens [batch, blocks, block]``, and ``count [blocks, batch]`` real tokens in each."""

    tokens: np.ndarray
    count: np.ndarray

    @classmethod
    def cut(cls, prompts: Prompts, vocab: int, chunk: SupportsIndex) -> "Blocks":
        """Pads prompts on the right and cuts them.

        Raises:
          CormError: for no prompt, an empty prompt, what is no id of the vocabulary, or a chunk below 1.
        """
        chunk = integer("chunk", chunk)
        rows = prompts_of(prompts, vocab)
        size = -(-TOKENS_PER_BLOCK // chunk) * chunk
        lengths = np.array([len(row) for row in rows], np.int32)
        blocks = -(-int(lengths.max()) // size)
        tokens = np.zeros((len(rows), blocks * size), np.int32)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = row
        count = np.clip(lengths[None] - size * np.arange(blocks)[:, None], 0, size).astype(np.int32)
        return cls(tokens.reshape(len(rows), blocks, size), count)


class Generation(NamedTuple):
    """New tokens of each prompt, without those that end a text, and the caches after them."""

    tokens: list[list[int]]
    caches: Caches

    def __repr__(self) -> str:
        if not isinstance(self.tokens, list):
            return leaves("Generation", self)
        return line("Generation", tokens=f"{between([len(row) for row in self.tokens])} new", caches=self.caches)


def prefill(
    model: Decoder,
    policy: Policies,
    caches: Caches,
    prompts: Prompts,
    *,
    chunk: SupportsIndex = 1,
    overflow: Overflow = "evict",
) -> tuple[Float[Array, "batch vocab"], Caches]:
    """Reads prompts of any lengths, each row with its own clock.

    Args:
      caches: as `make_caches` returns them, or after an earlier call; donated.
      prompts: token ids, one list or array a row, or one array ``[batch, tokens]``; the whole prompt, for policies that
        wait for its end.
      chunk: tokens between evictions. 1 is the exact recurrence; more is faster and remembers a little longer.
      overflow: what happens when no slot is free: the key that the policy ranks lowest is evicted and counted; or, with
        ``"error"``, `CacheOverflowError`. What overflowed before the call does not matter.

    Returns:
      Logits of each row's next token, and the caches.

    Raises:
      CormError: for bad token ids, caches of another model, policy or batch, or a capacity that cannot hold a chunk, or
        the prompt if the policy keeps all of it.
    """
    chunk = integer("chunk", chunk)
    one_of("overflow", overflow, OVERFLOW)
    blocks = Blocks.cut(prompts, model.config.vocab, chunk)
    lengths, config = blocks.count.sum(0, dtype=np.int32), model.config
    policies = per_layer(policy, config.layers)
    check_caches(policies, caches, config.kv_heads, config.head_dim, batch=len(lengths))
    check_prompt(policies, capacities(caches), int(lengths.max()))
    check_clock(caches, lengths)
    check = watch(caches, overflow)
    caches = set_prompt(policies, caches, lengths, lengths, chunk)
    logits = jnp.zeros((len(lengths), config.vocab), jnp.float32)
    for index, count in enumerate(blocks.count):
        logits, caches = _prefill_block(model, policy, caches, logits, blocks.tokens[:, index], count, chunk=chunk)
        check(caches)
    return logits, end_prompt(caches)


@partial(jax.jit, static_argnames="chunk", donate_argnames="caches")
@broadcasts
def _prefill_block(model, policy, caches, logits, tokens, count, *, chunk):
    x, caches, _ = forward(model, policy, caches, tokens, count, chunk=chunk)
    last = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(count[:, None] > 0, model.logits(last), logits), caches


@partial(jax.jit, static_argnames="steps", donate_argnames="caches")
@broadcasts
def decode(
    model: Decoder,
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

    Raises:
      CormError: for caches of another model, policy or batch.
    """
    check_batch("logits", logits, logits.shape[0], model.config.vocab)
    check_batch("done", done, logits.shape[0])

    def step(carry, xs):
        logits, done, caches = carry
        index, key = xs
        token = sample(logits, key, temperature, top_p)
        reads = ~done & (index < limit)
        x, caches, _ = forward(model, policy, caches, token[:, None], reads.astype(jnp.int32), chunk=1)
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
    model: Decoder,
    policy: Policies,
    prompts: Prompts,
    *,
    max_new_tokens: SupportsIndex,
    capacity: Capacity | None = None,
    stores: SupportsIndex | None = None,
    chunk: SupportsIndex = 1,
    overflow: Overflow = "evict",
    end: Any = (),
    temperature: Any = 0.0,
    top_p: Any = 1.0,
    seed: SupportsIndex = 0,
) -> Iterator[Generation]:
    """`generate`, a stretch of tokens at a time: each item holds the tokens that are new since the last.

    The caches of an item are given up for the next: read what you need from them before going on.
    """
    new, chunk = integer("max_new_tokens", max_new_tokens), integer("chunk", chunk)
    temperature = real("temperature", temperature, ">= 0", least=0)
    top_p = real("top_p", top_p, "in (0, 1]", above=0, most=1)
    seed = integer("seed", seed, -(2**63), 2**63 - 1)
    end = tuple(integer("an id in end", one, 0) for one in (np.ravel(end) if np.ndim(end) == 0 else end))
    one_of("overflow", overflow, OVERFLOW)
    rows = prompts_of(prompts, model.config.vocab)
    length = max(map(len, rows)) + new
    capacity = slots_for(policy, capacity, length, chunk)
    caches = make_caches(model, policy, batch=len(rows), capacity=capacity, stores=stores, tokens=length)
    check_prompt(policy, capacities(caches), max(map(len, rows)))

    def stretches() -> Iterator[Generation]:
        logits, held = prefill(model, policy, caches, rows, chunk=chunk, overflow=overflow)
        done, check = jnp.zeros(len(rows), bool), watch(held, overflow)
        for start in range(0, new, STRETCH):
            tokens, logits, done, held = decode(
                model,
                policy,
                held,
                logits,
                jax.random.fold_in(jax.random.key(seed), start),
                done,
                np.int32(new - start),
                np.asarray(end, np.int32),
                np.float32(temperature),
                np.float32(top_p),
                steps=STRETCH,
            )
            check(held)
            drawn = [[int(token) for token in row if token >= 0 and token not in end] for row in np.asarray(tokens)]
            yield Generation(drawn, held)
            if bool(done.all()):
                return

    return stretches()


def generate(model: Decoder, policy: Policies, prompts: Prompts, **options) -> Generation:
    """Continues prompts.

    Args:
      model, policy: what reads, and the rule by which its caches forget.
      prompts: token ids, one list or array a row, of any lengths; or one array ``[batch, tokens]``.
      max_new_tokens: the most to draw for each.
      capacity: slots a key-value head, of all layers or of each; by default as many as could ever be needed.
      stores: sets of slots a layer; 1 is a pool, of which each head takes what it needs. None: one for each head.
      chunk, overflow: how the prompt is read, see `prefill`.
      end: ids after which a row stops, usually ``tokenizer.end``.
      temperature, top_p, seed: see `sample`; greedy by default.

    Raises:
      CormError: for options out of range, empty prompts or token ids outside the vocabulary.
    """
    pieces = list(stream(model, policy, prompts, **options))
    tokens = [[token for piece in pieces for token in piece.tokens[row]] for row in range(len(pieces[0].tokens))]
    return Generation(tokens, pieces[-1].caches)


def watch(caches: Caches, overflow: Overflow) -> Callable[[Caches], None]:
    """A check of later caches: it raises if keys were evicted since for want of a slot and ``overflow`` is an error."""
    one_of("overflow", overflow, OVERFLOW)
    if overflow == "evict":
        return lambda caches: None
    before = [int(one.overflow.sum()) for one in caches]

    def check(caches: Caches) -> None:
        for layer, (one, earlier) in enumerate(zip(caches, before, strict=True)):
            if int(one.overflow.sum()) > earlier:
                raise CacheOverflowError(
                    f"layer {layer} ran out of its {capacities(caches)[layer]} slots a head: raise capacity, or "
                    "let it evict"
                )

    return check
