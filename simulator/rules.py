"""The specification, continued: eviction rules of the field in plain Python, written from their papers, and ours.

A rule belongs to one key-value head. `simulator.reading.read_layer` calls it for each key that is added and each query
that attended, and then for the keys that stay and the order of eviction. There is no JAX here, no slots and no batches.
Key ``i`` (from 0) has the 1-based position ``i + 1``; the clock ``t`` is the number of tokens seen. Both are Python
integers without a largest value.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from simulator.reference import important_keys


class Rule:
    """Keep everything; without a free slot the oldest key is evicted. The base of all other rules.

    Attributes:
      prompt: the clock at which the prompt ends; infinity if unknown.
      margin: see `simulator.reference.Reading`; also the smallest relative difference between two keys of which one was
        evicted.
      tied: whether a key was evicted, and another of equal score was not.
      waits: whether all keys stay until the prompt has been read.
    """

    prompt = math.inf
    margin = math.inf
    tied = False
    waits = False

    def begins(self, prompt: float) -> None:
        """Called before a prompt is read that ends at this clock. Several prompts may follow each other."""
        self.prompt = prompt

    def arrives(self, i: int, key: np.ndarray) -> None:
        """Called when key i is added."""

    def attended(self, t: int, head: int, rows: list[list[dict[int, float]]]) -> None:
        """Called after query t attended: ``rows[head][query head of the group] = {key: probability}``, of all heads."""

    def keeps(self, live: list[int], t: int) -> list[int]:
        """Which of the live keys stay after clock t."""
        return live

    def order(self, i: int, t: int) -> float:
        """The order of eviction: the lowest first, among equals the oldest. NaN is as low as -infinity."""
        return i

    def exempt(self, i: int, t: int) -> bool:
        """Whether key i is evicted only after all keys that are not exempt."""
        return False

    def without(self, live: list[int], t: int, count: int) -> list[int]:
        """The live keys without the ``count`` that are first in the order of eviction."""
        return without([self], [live], t, count)[0]

    def heeds(self, other: "Rule") -> None:
        """The close calls and ties of another rule, which this one asks, are its own."""
        self.margin, self.tied = min(self.margin, other.margin), self.tied or other.tied


class Corm(Rule):
    """CORM (arXiv 2404.15949), section 4: evict what none of the last w queries found important; the newest r stay.

    One number a key, ``last``, the clock at which it was last found important (never: -infinity):

        if t >= w:  evict every i with  last[i] <= t - w  and  pos[i] <= t - r

    This is equivalent to the paper's matrix in `simulator.reference.corm_messages`.
    """

    def __init__(self, *, window, recent, multiple=1, threshold="position", group="any", eager=False):
        self.window, self.recent, self.eager = window, recent, eager
        self.how = {"multiple": multiple, "threshold": threshold, "group": group}
        self.last: dict[int, float] = {}

    def attended(self, t, head, rows):
        found, margin = important_keys(rows[head], t, **self.how)
        self.margin = min(self.margin, margin)
        self.last |= dict.fromkeys(found, t)

    def keeps(self, live, t):
        if t < self.window and not self.eager:
            return live
        return [i for i in live if self.exempt(i, t) or self.order(i, t) > t - self.window]

    def order(self, i, t):
        return self.last.get(i, -math.inf)

    def exempt(self, i, t):
        return i + 1 > t - self.recent


class AdaptiveCorm(Corm):
    """CORM for heads that do not return to keys which CORM would have evicted; the other heads keep everything.

    A return is a query at clock t that finds a key important which CORM would not have kept at clock t - 1. A head
    keeps everything for the first ``trial`` tokens, and for ``patience`` queries more per return to a key that is live.
    """

    def __init__(self, *, window, recent, multiple, patience, trial):
        super().__init__(window=window, recent=recent, multiple=multiple, group="mean")
        self.patience, self.trial = int(patience), int(trial)
        self.returns: list[int] = []  # the key of each

    def attended(self, t, head, rows):
        live = list(rows[head][0])
        gone = set(live) - set(super().keeps(live, t - 1))
        super().attended(t, head, rows)
        self.returns += [i for i in live if i in gone and self.last.get(i) == t]

    def keeps(self, live, t):
        paid = self.patience * sum(i in live for i in self.returns)
        return live if t <= self.trial + paid else super().keeps(live, t)


class StreamingLLM(Rule):
    """StreamingLLM (arXiv 2309.17453), section 3.2: the first tokens and the newest stay. See `simulator.reading`."""

    def __init__(self, *, sinks, positions):
        self.sinks = sinks

    def exempt(self, i, t):
        return i < self.sinks


class Window(Rule):
    """A sliding window (arXiv 2310.06825, section 2): a key stays as long as the next query sees it.

    The query at position t sees the positions p with t - p < size.
    """

    def __init__(self, *, size):
        self.size = size

    def keeps(self, live, t):
        return [i for i in live if t - i < self.size]

    def exempt(self, i, t):
        return t - 1 - i < self.size  # the newest query sees it


class H2O(Rule):
    """H2O (arXiv 2306.14048), algorithm 1: evict the least accumulated attention; the newest are exempt."""

    def __init__(self, *, recent, attention):
        self.recent, self.attention = recent, attention
        self.sum: dict[int, float] = {}

    def attended(self, t, head, rows):
        for i in rows[head][0]:
            self.sum[i] = self.sum.get(i, 0.0) + sum(row[i] for row in rows[head]) / len(rows[head])

    def order(self, i, t):
        return self.sum[i] if self.attention == "sum" else self.sum[i] / (t - i)

    def exempt(self, i, t):
        return i + 1 > t - self.recent


class Scissorhands(Rule):
    """Scissorhands (arXiv 2305.17118), algorithm 2: above B keys, evict the m most often unimportant."""

    def __init__(self, *, budget, window, recent, drop):
        self.budget, self.window, self.recent, self.drop = budget, window, recent, drop
        self.unimportant: list[set[int]] = []  # one set a query

    def attended(self, t, head, rows):
        important, margin = important_keys(rows[head], t, multiple=1, threshold="position", group="mean")
        self.margin = min(self.margin, margin)
        self.unimportant.append(set(rows[head][0]) - important)

    def keeps(self, live, t):
        budget = max(allowance(self.budget, t), self.recent, 1)
        if len(live) <= budget:
            return live
        candidates = sum(not self.exempt(i, t) for i in live)
        share = math.floor(self.drop * budget + 1e-3)
        return self.without(live, t, min(max(share, len(live) - budget), candidates))

    def order(self, i, t):
        return -sum(i in query for query in self.unimportant[-self.window :])

    def exempt(self, i, t):
        return i + 1 > t - self.recent


class TOVA(Rule):
    """TOVA (arXiv 2401.06104), section 3: the lowest attention of the newest query, mean over the layer's heads.

    The paper's heads all keep the same tokens. Where they do not, because something else protects or caps them one by
    one, a head pays no attention to a token that it no longer holds: 0 enters the mean.
    """

    def attended(self, t, head, rows):
        every = [row for rows_of_head in rows for row in rows_of_head]
        self.attention = {i: sum(row.get(i, 0.0) for row in every) / len(every) for i in set().union(*every)}

    def order(self, i, t):
        return self.attention[i]


class L2Norm(Rule):
    """L2 norm (arXiv 2406.11430), section 4: the key with the largest norm is evicted."""

    def __init__(self):
        self.norm: dict[int, float] = {}

    def arrives(self, i, key):
        self.norm[i] = math.sqrt(sum(float(x) ** 2 for x in key))

    def order(self, i, t):
        return -self.norm[i]


class Random(Rule):
    """A draw from a hash: MurmurHash3's finalizer over the key's first coordinate, its position, clock and seed."""

    def __init__(self, *, seed, recent):
        self.seed, self.recent = int(seed), recent
        self.salt: dict[int, int] = {}

    def arrives(self, i, key):
        self.salt[i] = int(np.float32(key[0]).view(np.uint32))

    def order(self, i, t):
        draw = self.salt[i]
        for number in (i, t, self.seed):
            draw ^= number
            draw = ((draw ^ (draw >> 16)) * 0x85EBCA6B) % 2**32
            draw = ((draw ^ (draw >> 13)) * 0xC2B2AE35) % 2**32
            draw ^= draw >> 16
        return draw // 2

    def exempt(self, i, t):
        return i + 1 > t - self.recent


class SnapKV(Rule):
    """SnapKV (arXiv 2404.14469), section 4: the prompt's last queries score its keys, each with its neighbours.

    The paper treats one prompt. A later one in the same cache (the next turn of a conversation) is treated like the
    first: nothing is evicted while it is read; its own last queries, at most the window, score anew every live key
    before the window, be it of this prompt, of an earlier one, or generated; earlier scores are discarded. If a prompt
    is shorter than the window, fewer queries give scores, and the window includes keys from before the prompt.
    """

    waits = True

    def __init__(self, *, budget, window, kernel, pool):
        self.budget, self.window, self.kernel, self.pool = budget, window, kernel, pool

    def begins(self, prompt):
        super().begins(prompt)
        self.scores: list[dict[int, float]] = []  # one dictionary a head of the layer
        self.out: set[int] | None = None

    def attended(self, t, head, rows):
        self.head, self.scores = head, self.scores or [{} for _ in rows]
        for h, (scores, group) in enumerate(zip(self.scores, rows, strict=True)):
            for i in group[0]:
                if self.prompt - self.window_of(h) < t <= self.prompt:
                    scores[i] = scores.get(i, 0.0) + sum(row[i] for row in group) / len(group)
        if t == self.prompt:
            self.scores = [self._pooled(h, group[0]) for h, group in enumerate(rows)]

    def keeps(self, live, t):
        if t < self.prompt:
            return live
        if self.out is None:
            early = [i for i in live if not self.exempt(i, t)]
            self.out = set(early) - set(self.without(early, t, max(len(early) - self.allowed(), 0)))
        return [i for i in live if i not in self.out]

    def allowed(self):
        """How many keys stay of those before the window."""
        return self.beside()

    def beside(self):
        """How many keys the budget allows beside the window: B - w."""
        return max(allowance(self.budget, self.prompt) - self.window, 0)

    def order(self, i, t):
        return -1.0 if self.out and i in self.out else self.scores[self.head].get(i, 0.0) if self.scores else 0.0

    def exempt(self, i, t):
        return i >= self.prompt - self.window

    def window_of(self, head):
        """The window whose queries give the scores of a head."""
        return self.window

    def _pooled(self, head, live):
        early = [i for i in live if i < self.prompt - self.window_of(head)]
        scores, pooled = self.scores[head], {}
        for i in early:
            around = [scores[j] for j in early if abs(i - j) <= self.kernel // 2]
            pooled[i] = max(around) if self.pool == "max" else math.fsum(around) / self.kernel
        return pooled


class PyramidKV(SnapKV):
    """PyramidKV (arXiv 2406.02069), section 4.2: SnapKV, with an arithmetic sequence of budgets over the layers."""

    def __init__(self, *, layer, layers, **options):
        super().__init__(**options)
        self.layer, self.layers = layer, layers

    def beside(self):
        b, layer, layers = super().beside(), self.layer, self.layers
        low = b // 20
        high = 2 * b - low
        each = [Fraction(high) - Fraction((high - low) * i, max(layers - 1, 1)) for i in range(layers)]
        if layers == 1:
            each = [Fraction(b)]
        return math.floor(sum(each[: layer + 1])) - math.floor(sum(each[:layer]))


class AdaKV(SnapKV):
    """Ada-KV (arXiv 2407.11550), algorithm 1: the heads of a layer compete for one budget, above a common floor.

    The budget of the layer is the sum of the budgets of its heads. ``shares`` are the budget and the window of each
    head of the layer, where they differ; each head judges by its own window.
    """

    def __init__(self, *, floor, shares=None, **options):
        super().__init__(**options)
        self.floor, self.shares = floor, shares

    def window_of(self, head):
        return self.shares[head][1] if self.shares else self.window

    def allowed(self):
        even = self.beside()
        every = sorted((score, i, head) for head, scores in enumerate(self.scores) for i, score in scores.items())
        shares = self.shares or [(self.budget, self.window)] * len(self.scores)
        cut = max(len(every) - sum(max(allowance(b, self.prompt) - w, 0) for b, w in shares), 0)
        for (low, *_), (high, *_) in zip(every[:cut][-1:], every[cut:], strict=False):
            if low != high:
                self.margin = min(self.margin, (high - low) / high)
            self.tied |= low == high
        mine = sum(head == self.head for _, _, head in every[cut:])
        share = Fraction(round(1000 * self.floor), 1000)
        return math.floor((1 - share) * mine + share * even + Fraction(1, 2))


class Oneshot(Rule):
    """Another rule, which evicts nothing before the prompt has been read."""

    waits = True

    def __init__(self, rule: Rule):
        self.rule = rule
        self.arrives, self.attended, self.order, self.exempt = rule.arrives, rule.attended, rule.order, rule.exempt

    def begins(self, prompt):
        super().begins(prompt)
        self.rule.begins(prompt)

    def keeps(self, live, t):
        live = live if t < self.prompt else self.rule.keeps(live, t)
        self.heeds(self.rule)
        return live


class Protect(Rule):
    """Another rule, which never evicts the first ``sinks`` and the newest ``recent`` keys."""

    def __init__(self, rule: Rule, *, sinks, recent):
        self.rule, self.sinks, self.recent, self.waits = rule, sinks, recent, rule.waits
        self.begins, self.arrives, self.attended, self.order = rule.begins, rule.arrives, rule.attended, rule.order

    def keeps(self, live, t):
        kept = self.rule.keeps(live, t)
        self.heeds(self.rule)
        return [i for i in live if i in kept or self._safe(i, t)]

    def exempt(self, i, t):
        return self._safe(i, t) or self.rule.exempt(i, t)

    def _safe(self, i, t):
        return i < self.sinks or i + 1 > t - self.recent


class Budget(Rule):
    """Another rule, after which keys are evicted in its order until at most so many are left.

    If the other rule keeps all keys until the prompt has been read, the budget holds from then on.
    """

    def __init__(self, rule: Rule, *, tokens, per_mille, least):
        self.rule, self.tokens, self.per_mille, self.least = rule, tokens, per_mille, max(least, 1)
        self.arrives, self.attended, self.waits = rule.arrives, rule.attended, rule.waits
        self.order, self.exempt = rule.order, rule.exempt

    def begins(self, prompt):
        super().begins(prompt)
        self.rule.begins(prompt)

    def keeps(self, live, t):
        live = self.rule.keeps(live, t)
        self.heeds(self.rule)
        if self.waits and t < self.prompt:
            return live
        limit = max(self.tokens + t * self.per_mille // 1000, self.least)
        return self.without(live, t, max(len(live) - limit, 0))


def allowance(size: int | float, tokens: float) -> int:
    """How many keys a budget is: a whole number of them, or a share of so many tokens, to the thousandth."""
    return math.floor(Fraction(round(1000 * size), 1000) * int(tokens)) if isinstance(size, float) else size


def without(rules: Sequence[Rule], live: list[list[int]], t: int, count: int) -> list[list[int]]:
    """The live keys of some heads without the first ``count`` of all by eviction order, of equals the first head's."""
    live = [list(keys) for keys in live]
    for left in range(count, 0, -1):
        ranked = []
        for head, rule in enumerate(rules):
            for i in live[head]:
                exempt = rule.exempt(i, t)
                order = 0 if exempt else rule.order(i, t)
                ranked.append((exempt, -math.inf if math.isnan(order) else order, i, head))
        (last, a, i, head), *others = sorted(ranked)
        for exempt, b, *_ in others:
            if not exempt and isinstance(b, float) and a != b and math.isfinite(a + b):  # else rounding decides nothing
                for rule in rules:
                    rule.margin = min(rule.margin, abs(a - b) / max(abs(a), abs(b)))
        live[head].remove(i)
        tied = any(other[:2] == (last, a) for other in others)
        for rule in rules if left == 1 else ():  # the order in which all of them are evicted decides nothing
            rule.tied |= tied
    return live
