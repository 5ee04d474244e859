"""Prefill, decoding and generation. Two compiled programs serve prompts of any length: one reads a block, one decodes.

Prompts are read in blocks of a fixed size, the last of which is padded. Inside a block, `jax.lax.scan` runs over the
chunks, and the policy evicts after each. Decoding is a `jax.lax.scan` over `STRETCH` tokens. Caches are donated, so
that they are updated in place.
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
from corm_jax.core.capacity import capacities, slots_for
from corm_jax.core.options import integer, one_of, real
from corm_jax.core.prompt import check_clock, check_prompt, end_prompt, set_prompt
from corm_jax.core.types import Caches, Capacity
from corm_jax.errors import CacheOverflowError
from corm_jax.model.decoder import Decoder, Policies, forward, make_caches, policies_of, windows_of
from corm_jax.showing.brief import between, leaves, line

TOKENS_PER_BLOCK = 256
"""Tokens of a prompt in one run of the model, rounded up to a multiple of the chunk. It does not change results."""

STRETCH = 16
"""Tokens that are decoded in one run of the compiled program."""

Overflow = str
OVERFLOW = ("evict", "error")


class Blocks(NamedTuple):
    """Prompts in blocks: ``tokens [batch, blocks, block]``, of which ``count [blocks, batch]`` are no padding."""

    tokens: np.ndarray
    count: np.ndarray

    @classmethod
    def cut(cls, prompts: Prompts, vocab: int, chunk: SupportsIndex) -> "Blocks":
        """Pads prompts on the right and cuts them into blocks.

        Raises:
          CormError: for no prompt, an empty prompt, ids outside the vocabulary, or a chunk below 1.
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
    """The new tokens of each prompt, without those that end a text, and the caches after they were read."""

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
    """Reads prompts into caches. The prompts of a batch may have different lengths.

    Args:
      caches: those of `make_caches`, or of an earlier call. They are donated.
      prompts: token ids, a list or an array for each row, or one array ``[batch, tokens]``. For policies that wait for
        the end of the prompt, it must be the whole prompt.
      chunk: tokens between two evictions. 1 is the exact recurrence. With more, reading is faster, and keys are evicted
        a little later.
      overflow: what happens when no slot is free. ``"evict"``: the key with the lowest score is evicted and counted.
        ``"error"``: a `CacheOverflowError` is raised, unless the overflow was before this call.

    Returns:
      The logits of the next token of each row, and the caches.

    Raises:
      CormError: for ids outside the vocabulary, caches of another model, policy or batch, and a capacity that cannot
        hold a chunk, or the prompt if the policy keeps all of it.
    """
    chunk = integer("chunk", chunk)
    one_of("overflow", overflow, OVERFLOW)
    blocks = Blocks.cut(prompts, model.config.vocab, chunk)
    lengths, config = blocks.count.sum(0, dtype=np.int32), model.config
    policies = policies_of(model, policy)
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
    """Draws up to ``steps`` tokens for each row, and evicts after each token: one `jax.lax.scan`.

    A row stops if it is ``done``, or has drawn ``limit`` tokens or one of ``end``. From then on its cache does not
    change, and its tokens are -1.

    Returns:
      The tokens, the logits of the next token, which rows have drawn a token of ``end``, and the caches.

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
    """Draws a token for each row.

    At temperature 0 it is the likeliest token. Otherwise it is drawn from the softmax of ``logits / temperature``,
    among the likeliest tokens: as few as have a total probability of ``top_p`` or more.
    """

    def draw(logits):
        scaled = logits / temperature
        ordered = -jnp.sort(-scaled, axis=-1)
        probability = jax.nn.softmax(ordered)
        inside = jnp.cumsum(probability, axis=-1) - probability < top_p  # always true of the likeliest token
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
    """`generate` as an iterator: each item has the few tokens of each row that are new since the last item.

    The caches of an item are donated when the next item is computed, so read what you need from them before.
    """
    new, chunk = integer("max_new_tokens", max_new_tokens), integer("chunk", chunk)
    temperature = real("temperature", temperature, ">= 0", least=0)
    top_p = real("top_p", top_p, "in (0, 1]", above=0, most=1)
    seed = integer("seed", seed, -(2**63), 2**63 - 1)
    end = tuple(integer("an id in end", one, 0) for one in (np.ravel(end) if np.ndim(end) == 0 else end))
    one_of("overflow", overflow, OVERFLOW)
    rows = prompts_of(prompts, model.config.vocab)
    length = max(map(len, rows)) + new
    capacity = slots_for(policy, capacity, length, chunk, windows_of(model.config))
    how = {"stores": stores, "tokens": length, "chunk": chunk}
    caches = make_caches(model, policy, batch=len(rows), capacity=capacity, **how)
    check_prompt(policies_of(model, policy), capacities(caches), max(map(len, rows)))

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
    """Reads prompts and continues each of them.

    Args:
      model: the decoder.
      policy: the policy of its caches, or one for each layer.
      prompts: token ids, a list or an array for each row, of any lengths, or one array ``[batch, tokens]``.
      max_new_tokens: the most tokens to draw for each prompt.
      capacity: slots of a key-value head, a number or one for each layer; by default as many as the policy can need.
      stores: sets of slots in a layer. 1 is a pool that all heads share; None gives each head its own.
      chunk, overflow: how the prompt is read, see `prefill`.
      end: ids after which a row stops, usually ``tokenizer.end``.
      temperature, top_p: see `sample`; by default the likeliest token is drawn.
      seed: of the random numbers.

    Raises:
      CormError: for options out of range, empty prompts or token ids outside the vocabulary.
    """
    pieces = list(stream(model, policy, prompts, **options))
    tokens = [[token for piece in pieces for token in piece.tokens[row]] for row in range(len(pieces[0].tokens))]
    return Generation(tokens, pieces[-1].caches)


def watch(caches: Caches, overflow: Overflow) -> Callable[[Caches], None]:
    """Makes a check for later caches. With ``"error"`` it raises if keys have overflowed since ``caches``."""
    one_of("overflow", overflow, OVERFLOW)
    if overflow == "evict":
        return lambda caches: None
    before = [int(one.overflow.sum()) for one in caches]

    def check(caches: Caches) -> None:
        for layer, (one, earlier) in enumerate(zip(caches, before, strict=True)):
            if int(one.overflow.sum()) > earlier:
                raise CacheOverflowError(
                    f"layer {layer} ran out of its {capacities(caches)[layer]} slots a head: raise the capacity, or "
                    "choose overflow evict"
                )

    return check
