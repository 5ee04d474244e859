"""Capacities: how many slots a policy needs, in each layer, and policies layer by layer."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from corm_jax.core.options import concrete, integer, map_numbers, numbers_in
from corm_jax.core.policy import Policy, check_policy
from corm_jax.core.types import Caches, Capacity
from corm_jax.errors import CormError

PROTECTED = "the keys that the policy never evicts, such as its recent ones"


def per_layer(policy: Policy | Sequence[Policy], layers: int, among: Sequence[int] | None = None) -> tuple[Policy, ...]:
    """A list with one policy for each layer, made from one policy, or a list that has one for each already.

    From one policy, `Policy.for_layer` makes that of each layer. Hyperparameters ``[layers, kv_heads]`` have one number
    for each layer and head. If only the layers ``among`` all are wanted, `Policy.for_layer` counts these alone.

    >>> from corm_jax.policies import Corm
    >>> [one.window.tolist() for one in per_layer(Corm(window=np.array([[16, 64], [32, 8]])), 2)]
    [[16, 64], [32, 8]]

    Raises:
      CormError: for another number of policies, or of rows of hyperparameters, than there are layers.
    """
    wanted = range(layers) if among is None else among
    if isinstance(policy, list | tuple) and not isinstance(policy, Policy):
        if len(policy) != layers:
            raise CormError(f"{len(policy)} policies for {layers} layers: give one for all, or one for each")
        for one in policy:
            check_policy(one)
        return tuple(policy[layer] for layer in wanted)
    check_policy(policy)
    one: Any = policy
    for shape in map(np.shape, numbers_in(policy).values()):
        if len(shape) == 2 and shape[0] != layers:
            raise CormError(
                f"the policy has hyperparameters for {shape[0]} layers of {shape[1]} heads, not for {layers} layers: "
                "give [layers, kv_heads]"
            )

    def of_layer(place: int, layer: int) -> Policy:
        return map_numbers(lambda x: x[layer] if np.ndim(x) == 2 else x, one.for_layer(place, len(wanted)))

    return tuple(of_layer(place, layer) for place, layer in enumerate(wanted))


def per_layer_capacity(capacity: Capacity, layers: int) -> tuple[int, ...]:
    """One capacity a layer: those given, or the one given."""
    sizes = _sizes(capacity)
    if isinstance(sizes, int):
        return (sizes,) * layers
    if len(sizes) != layers:
        raise CormError(f"{len(sizes)} capacities for {layers} layers: give one for all, or one for each")
    return sizes


def _sizes(capacity: Capacity) -> int | tuple[int, ...]:
    """A capacity as an int, or as one int for each layer."""
    if isinstance(capacity, list | tuple) or np.ndim(capacity) == 1:  # pyright: ignore
        return tuple(integer(f"capacity[{layer}]", one) for layer, one in enumerate(capacity))  # pyright: ignore
    return integer("capacity", capacity)


def several(policy: Policy | Sequence[Policy]) -> Sequence[Policy]:
    """The policies given, one or several."""
    one = isinstance(policy, Policy) or not isinstance(policy, list | tuple)
    return [policy] if one else policy  # pyright: ignore


def slots_for(
    policy: Policy | Sequence[Policy], capacity: Capacity | None, tokens: SupportsIndex, chunk: SupportsIndex
) -> int | tuple[int, ...]:
    """The capacity to allocate: ``capacity`` if it is possible, or for None as many slots as can be needed.

    That is one slot for every token, or, for policies that keep at ``most`` so many keys, that number and a chunk.
    """
    tokens, chunk, policies = integer("tokens", tokens), integer("chunk", chunk), several(policy)
    for one in policies:
        check_policy(one)
    if capacity is None:
        most: list[Any] = [one.traits.most for one in policies]
        if not all(concrete(one) for one in most):
            return max(tokens, chunk)
        return max(min(tokens, max(int(np.max(one)) for one in most) + chunk), chunk)
    sizes = _sizes(capacity)
    check_slots(sizes, chunk, "a chunk")
    if not isinstance(sizes, int):
        policies = per_layer(policy, len(sizes))
    protected = [one.traits.protected for one in policies]
    needs = [int(np.max(one)) if concrete(one) else 0 for one in protected]
    check_slots(sizes, max(needs) if isinstance(sizes, int) else needs, PROTECTED)
    return sizes


def check_slots(capacity: Capacity, need: int | Sequence[int], what: str) -> None:
    """Raises unless there are slots for ``need`` keys of a head, in every layer, or for the need of each."""
    given = _sizes(capacity)
    sizes = [given] if isinstance(given, int) else list(given)
    needs = [need] * len(sizes) if isinstance(need, int) else list(need)
    layer = max(range(len(sizes)), key=lambda layer: needs[layer] - sizes[layer])
    if sizes[layer] < needs[layer]:
        where = "" if len(set(sizes)) == 1 else f" of layer {layer}"
        raise CormError(f"capacity {sizes[layer]}{where} cannot hold {what} ({needs[layer]} keys): raise the capacity")


def capacities(caches: Caches) -> list[int]:
    """Slots a key-value head of a batch, layer by layer."""
    return [one.position[0].size // one.overflow.shape[1] for one in caches]
