"""Reading a layer under rules: plain Python, one query at a time, with the form of the attention.

`read_layer` calls the rules of `simulator.rules`, one for each key-value head: for each key that is added, for each
query that attended, and then for the keys that stay. If there are too few slots, the keys that are first in the order
of eviction are evicted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simulator.reference import Reading, attention, stored
from simulator.rules import Rule, without


def rotated(x: np.ndarray, position: int, frequencies: np.ndarray) -> np.ndarray:
    """RoPE (arXiv 2104.09864): pair j, the complex number x_j + i x_(j + d/2), times exp(i position frequency_j)."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * np.asarray(frequencies, np.float64))
    return np.concatenate([turned.real, turned.imag])


@dataclass(frozen=True)
class Form:
    """The form of an attention, see `corm_jax.core.form`: a logit is ``cap(scale q . k) - slope distance``.

    Attributes:
      scale: None for ``1 / sqrt(head_dim)``.
      softcap: ``cap(x) = softcap tanh(x / softcap)``; None for no cap.
      window: a query sees itself and the ``window - 1`` positions before it.
      mask: whether a query at one position sees a key at another.
      slopes: ``[kv_heads][group]``, ALiBi (arXiv 2108.12409): the distance to a key costs so much.
      frequencies: radians a token for each pair of a head, by which queries and keys are rotated.
      in_cache: whether positions are counted among the live keys of a head, 0 for the oldest, not in the text.
    """

    scale: float | None = None
    softcap: float | None = None
    window: float = math.inf
    mask: Callable[[int, int], bool] = lambda query, key: True
    slopes: Sequence[Sequence[float]] | None = None
    frequencies: np.ndarray | None = None
    in_cache: bool = False

    def rotated(self, x: np.ndarray, place: int) -> np.ndarray:
        """A query or key, encoded by a position."""
        return x if self.frequencies is None else rotated(x, place, self.frequencies)

    def attend(self, head: int, queries, keys, values, live: Sequence[int], index: int) -> list:
        """`attention` of each query of a group at position ``index``, over those of the live keys that it sees."""
        place = {i: place if self.in_cache else i for place, i in enumerate(live)}
        seen = [i for i in live if index - i < self.window and self.mask(index, i)]
        found = []
        for one, query in enumerate(queries):
            slope = self.slopes[head][one] if self.slopes is not None else 0.0

            def logit(i, product, query=query, slope=slope):
                scaled = product / math.sqrt(len(query)) if self.scale is None else self.scale * product
                capped = scaled if self.softcap is None else self.softcap * math.tanh(scaled / self.softcap)
                return capped - slope * (place[index] - place[i])

            held = {i: self.rotated(keys[i], place[i]) for i in seen}
            row, output = attention(self.rotated(query, place[index]), held, values, seen, logit)
            found.append(({i: row.get(i, 0.0) for i in live}, output))
        return found


def read_head(rule: Rule, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, **how) -> Reading:
    """`read_layer` for one head: ``queries [tokens, group, head_dim]``, ``keys, values [tokens, head_dim]``."""
    return read_layer([rule], queries[:, None], keys[:, None], values[:, None], **how)[0]


def read_layer(
    rules: Sequence[Rule],
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    chunks: Sequence[int] | None = None,
    capacity: int | None = None,
    stores: int | None = None,
    prompt: float | Mapping[int, float] = math.inf,
    form: Form = Form(),
    start: int = 0,
) -> list[Reading]:
    """Reads one sequence through the heads of a layer.

    Args:
      rules: a fresh one for each head.
      queries: ``[tokens, kv_heads, group, head_dim]``.
      keys, values: ``[tokens, kv_heads, head_dim]``.
      chunks, capacity: as in `simulator.reference.corm_messages`.
      stores: the heads share so many sets of slots, equally many heads each, ``capacity`` for each head; None: each
        has its own.
      prompt: the clock at which the prompt ends, infinity if unknown; for several prompts, the end of each by the clock
        at which it begins, where a chunk must begin too.
      form: that of the attention.
      start: the clock before the first of these tokens, if earlier tokens were read and none of their keys is live.
    """
    prompts = prompt if isinstance(prompt, Mapping) else {start: prompt}
    tokens, heads, group, _ = queries.shape
    live: list[list[int]] = [[] for _ in rules]
    kept: list[list[set[int]]] = [[] for _ in rules]
    lost, outputs = [0] * heads, np.zeros((heads, tokens, group, values.shape[-1]))
    keys, first = stored(keys, values), start
    for size in [1] * tokens if chunks is None else chunks:
        end = start + size
        for rule in rules:
            if start in prompts or start == first:
                rule.begins(prompts.get(start, math.inf))
        each = heads // (stores or heads)
        for sharing in [range(first_, first_ + each) for first_ in range(0, heads, each)]:
            held = [live[head] for head in sharing]
            short = 0 if capacity is None else max(sum(map(len, held)) + (size - capacity) * len(sharing), 0)
            for head, before, after in zip(
                sharing, held, without([rules[h] for h in sharing], held, end, short), strict=True
            ):
                live[head] = after
                lost[head] += len(before) - len(after)
        for head, rule in enumerate(rules):
            for i in range(start, end):
                rule.arrives(i, keys[i - first, head])
            live[head] = live[head] + list(range(start, end))
        for index in range(start, end):
            rows: list[list[dict[int, float]]] = []
            for head in range(heads):
                visible = [i for i in live[head] if i <= index]
                held = {i: keys[i - first, head] for i in visible}
                read_ = {i: values[i - first, head] for i in visible}
                found = form.attend(head, queries[index - first, head], held, read_, visible, index)
                rows.append([row for row, _ in found])
                outputs[head, index - first] = [output for _, output in found]
            for head, rule in enumerate(rules):
                rule.attended(index + 1, head, rows)
        for head, rule in enumerate(rules):
            live[head] = rule.keeps(live[head], end)
            kept[head].append(set(live[head]))
        start = end
    return [Reading(kept[h], outputs[h], lost[h], rules[h].margin) for h in range(heads)]
