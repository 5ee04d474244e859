"""Bounds: the most attention that a policy could have kept with as many keys.

The mass of a query is the share of the full cache's attention that falls on the keys that it can still attend to: the
mean over the query heads of a group. Let query t attend to ``n[t]`` keys, its own key always among them. Then

- `most` is the mass of the n[t] keys of each query with the most attention. An evicted key may come back here, so no
  policy has more mass.
- `greedy` is the mass of a rule under which no evicted key comes back. It evicts the key to which all later queries
  together attend least. It knows these queries but does not plan ahead, so the best policy without return has at
  least as much mass.
- `exact` is the largest mass without return, by linear programming, for traces of up to a few hundred steps.

So  policy <= exact <= most  and  greedy <= exact,  at the same ``n``, summed over the steps.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax.core.arrays import broadcasts, iota
from corm_jax.errors import CormError
from corm_jax.showing.brief import leaves, line, table
from corm_jax.showing.labelled import Variable, dataset
from corm_jax.traces.meta import Rows
from corm_jax.traces.trace import Trace
from simulator.forms import form_of, slopes_by_head
from simulator.replay import About, Replay

if TYPE_CHECKING:
    import xarray

EXACT_STEPS = 300
"""The most steps of a head for which `exact` is computed: its linear programme has steps^2 / 2 variables."""


class Bounds(NamedTuple):
    """Mass by step, float32 ``[layers, kv_heads, steps]``, with as many keys as the queries of a replay attended to.

    Attributes:
      policy: the mass of the replayed policy.
      most: the upper bound of any policy.
      greedy: the mass of the greedy rule, which knows later queries; no evicted key comes back.
      about: what was replayed, and how.
    """

    policy: np.ndarray
    most: np.ndarray
    greedy: np.ndarray
    about: About | None = None

    def __repr__(self) -> str:
        if not all(np.ndim(values) == 3 for values in self[:3]):
            return leaves("Bounds", self[:3])
        layers, kv_heads, steps = np.shape(self.policy)
        return line("Bounds", layers=layers, kv_heads=kv_heads, steps=steps, **self._means)

    def _repr_html_(self) -> str | None:
        if not all(np.ndim(values) == 3 for values in self[:3]):
            return None
        about = {"policy": self.about.policy, "model": self.about.model or None} if self.about else {}
        means = {f"mass, {name}": value for name, value in self._means.items()}
        return table("Bounds", {"replay of": about.pop("policy", None)} | about | means)

    @property
    def _means(self) -> dict[str, str]:
        names = zip(self._fields[:3], self[:3], strict=True)
        return {name: f"{np.mean(values, dtype=np.float64):.3f}" for name, values in names}

    def to_xarray(self) -> "xarray.Dataset":
        """The bounds and the regret as a dataset with named axes: ``layer``, ``kv_head`` and ``step``, clocks from 1.

        >>> Bounds(*np.ones((3, 2, 1, 4))).to_xarray().regret.dims
        ('layer', 'kv_head', 'step')
        """
        names = {
            "policy": "mass that the policy kept",
            "greedy": "mass of the greedy rule, which knows later queries; no evicted key comes back",
            "most": "mass of the keys with the most attention, as many as the policy had",
            "regret": "how much more mass the best choice of as many keys would keep",
        }
        variables = {
            name: Variable("layer kv_head step", getattr(self, name), text, "share of attention")
            for name, text in names.items()
        }
        attrs = {name: getattr(self.about, name) for name in ("policy", "model")} if self.about else {}
        return dataset(variables, coords={"step": np.arange(1, self.policy.shape[-1] + 1)}, attrs=attrs)

    @property
    def regret(self) -> np.ndarray:
        """``most - policy``: how much more mass the best choice of as many keys would keep."""
        return self.most - self.policy


def bounds(trace: Trace, replay: Replay, progress: Callable[[int], None] = lambda done: None) -> Bounds:
    """`most` and `greedy` for a replay of this trace, layer by layer.

    >>> from corm_jax import Corm
    >>> from simulator.replay import replay
    >>> from simulator.synthetic import heavy_hitters
    >>> trace = heavy_hitters(layers=1, steps=128)
    >>> found = bounds(trace, replay(trace, Corm(window=16, recent=8)))
    >>> means = found.policy.mean(), found.greedy.mean(), found.most.mean()
    >>> bool(means[0] < means[1] < means[2])
    True

    Raises:
      CormError: if the replay is of another trace.
    """
    meta, n = trace.meta, replay.attended
    if n.shape != (meta.layers, meta.kv_heads, meta.steps):
        raise CormError(
            f"a replay of shape {n.shape} does not belong to a trace of {meta.layers, meta.kv_heads, meta.steps} "
            "(layers, kv_heads, steps): replay this trace"
        )
    upper, lower = np.empty(n.shape, np.float32), np.empty(n.shape, np.float32)
    for layer in range(meta.layers):
        for head, alpha in enumerate(attention(trace, layer)):
            upper[layer, head] = most(alpha, n[layer, head])
            lower[layer, head] = greedy(alpha, n[layer, head])
        progress(layer + 1)
    mass = replay.mass.reshape(meta.layers, meta.kv_heads, -1, meta.steps).mean(2)
    if (mass > upper + 1e-3).any():
        raise CormError("the replay has more mass than is possible on this trace: replay this trace, not another")
    return Bounds(mass, upper, lower, replay.about)


def attention(trace: Trace, layer: int) -> Iterator[np.ndarray]:
    """The full cache's attention, head by head, the mean over each group: float32 ``[steps, keys]``."""
    data, group = trace.layer(layer), trace.meta.group
    for head in range(trace.meta.kv_heads):
        queries = slice(head * group, (head + 1) * group)
        if isinstance(data, Rows):
            rows = data.probs[queries]
            yield (rows / rows.sum(-1, keepdims=True)).mean(0)  # as in a replay, since rounded rows do not sum to 1
        else:
            form = form_of(trace.meta, layer)._replace(encoding=None)
            slopes = slopes_by_head(trace.meta)[head]
            yield np.asarray(_attention(data.q[:, queries], data.k[:, head], slopes, form))


@jax.jit
@broadcasts
def _attention(q, k, slopes, form):
    steps, group, head_dim = q.shape
    distance = iota(steps)[:, None] - iota(steps)
    far = distance.astype(jnp.float32)
    seen = distance >= 0 if form.window is None else (distance >= 0) & (distance < form.window)

    def add(total, xs):  # one query head at a time, to bound the memory
        rows, slope = xs
        logits = form.of(jnp.einsum("qd,kd->qk", rows, k, precision="highest"), head_dim) - slope * far
        return total + jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)), None

    start = jnp.zeros((steps, steps), jnp.float32)
    return jax.lax.scan(add, start, (q.swapaxes(0, 1), slopes))[0] / group


def most(alpha: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The mass of the ``n[t]`` keys of each query with the most attention, its own key always among them.

    Args:
      alpha: float32 ``[steps, keys]``, rows that sum to 1.
      n: int32 ``[steps]``, at least 1.

    Returns:
      float32 ``[steps]``.
    """
    others = np.array(alpha)
    np.fill_diagonal(others, 0)
    others.sort(-1)
    others[np.arange(len(n))[::-1] >= n[:, None] - 1] = 0  # sorted upwards: the last n - 1 stay
    return np.diagonal(alpha) + others.sum(-1)


def greedy(alpha: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The mass of the greedy rule: the key to which all later queries together attend least is evicted for good.

    Arguments and result are those of `most`.
    """
    mass = np.empty(len(n), np.float32)
    future = alpha.sum(0, dtype=np.float64)
    live = np.zeros(len(n), bool)
    for t, row in enumerate(alpha):
        held = np.flatnonzero(live)
        if (excess := len(held) + 1 - n[t]) > 0:
            live[held[np.argpartition(future[held], excess - 1)[:excess]]] = False
        live[t] = True
        mass[t] = row[live].sum()
        future -= row
    return mass


def exact(alpha: np.ndarray, n: np.ndarray) -> float:
    """The largest mass with ``n[t]`` keys, summed over the steps, if no evicted key comes back.

    A linear programme, in which x[t, i] is 1 if query t can attend to key i, and 0 if not:

        maximise  sum alpha[t, i] x[t, i]   with   x[t, i] <= x[t - 1, i],   sum_i x[t, i] <= n[t],   x[t, t] = 1

    This is a network flow of slots through the keys that they hold one after the other, so the optimum is reached at
    whole numbers. Arguments are those of `most`.

    >>> alpha = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.7, 0.1]])
    >>> round(exact(alpha, np.array([1, 1, 2])), 3)         # at clock 2 there is one slot: key 0 is evicted
    2.3

    Raises:
      CormError: for more steps than `EXACT_STEPS`.
    """
    from scipy.optimize import linprog  # comes with jax
    from scipy.sparse import coo_array, vstack

    steps = len(n)
    if steps > EXACT_STEPS:
        raise CormError(f"the exact optimum is computed for at most {EXACT_STEPS} steps, not {steps}: give fewer")
    t, i = np.tril_indices(steps, -1)
    itself = float(np.trace(alpha))
    if not len(t):
        return itself
    index = np.full((steps, steps), -1)
    index[t, i] = np.arange(len(t))
    (stays,) = np.nonzero(i < t - 1)  # x[t, i] - x[t - 1, i] <= 0
    rows = np.arange(len(stays))
    returns = coo_array(
        (
            np.repeat([1.0, -1.0], len(stays)),
            (np.tile(rows, 2), np.concatenate([stays, index[t[stays] - 1, i[stays]]])),
        ),
        shape=(len(stays), len(t)),
    )
    sizes = coo_array((np.ones(len(t)), (t - 1, np.arange(len(t)))), shape=(steps - 1, len(t)))
    solution = linprog(
        -alpha[t, i],
        A_ub=vstack([returns, sizes], format="csr"),
        b_ub=np.concatenate([np.zeros(len(stays)), n[1:] - 1]),
        bounds=(0, 1),
        method="highs",
    )
    return itself - float(solution.fun)
