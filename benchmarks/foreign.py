"""Caches of other packages as functions that `simulator.kept.check_kept` takes: kvpress, transformers and keys_values.

Each class uses the real package: a call gives it the arrays, and reads from its cache which keys are still held.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def steps(tokens: int, prompt: int) -> Iterator[slice]:
    """The slice of the prompt, and then that of each token."""
    return (slice(*ends) for ends in zip([0, *range(prompt, tokens)], range(prompt, tokens + 1), strict=True))


@dataclass
class Press:
    """A press of kvpress, by its own hook, in an attention layer of transformers' Llama.

    The projections of the layer only select query, key and value from each hidden state, and nothing is rotated, so the
    layer attends with exactly the numbers that are given. These presses do not use values. So each value can hold the
    position of its key.

    Attributes:
      press: the press.
      budget: keys a head. The compression ratio is set for half a key more, which kvpress rounds down. None for a press
        without a ratio.
      layer, layers: the index of the layer, and how many layers the model has.
      eager: for presses that need attention weights.
    """

    press: Any
    budget: int | None = None
    layer: int = 0
    layers: int = 1
    eager: bool = field(default=False, repr=False)

    def __call__(self, queries, keys, values, prompt):
        """As `check_kept` calls it."""
        import torch
        from transformers import DynamicCache, LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaAttention

        tokens, kv_heads, group, head_dim = queries.shape
        heads, wide = kv_heads * group, (group + 2) * kv_heads * head_dim
        config = LlamaConfig(
            hidden_size=wide, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
            num_hidden_layers=self.layers, attn_implementation="eager" if self.eager else "sdpa",
        )  # fmt: skip
        module, picks = LlamaAttention(config, self.layer), torch.eye(wide)
        ends = np.cumsum([heads, kv_heads, kv_heads]) * head_dim
        for name, begin, end in zip("qkv", [0, *ends], ends, strict=False):
            getattr(module, f"{name}_proj").weight.data = picks[begin:end]
        values[..., 0] = np.arange(tokens)[:, None]
        hidden = torch.from_numpy(np.concatenate([x.reshape(tokens, -1) for x in (queries, keys, values)], 1))[None]
        mask = torch.full((prompt, prompt), -torch.inf).triu(1)[None, None] if self.eager else None
        press, cache, kept = copy.deepcopy(self.press), DynamicCache(config=config), []
        if self.budget:
            press.compression_ratio = max(1 - (self.budget + 0.5) / prompt, 0.0)
        module.register_forward_hook(press.forward_hook, with_kwargs=True)
        for part in steps(tokens, prompt):
            one = torch.ones(1, part.stop - part.start, head_dim)
            with torch.no_grad():
                module(
                    hidden_states=hidden[:, part], position_embeddings=(one, 0 * one),
                    attention_mask=None if part.start else mask, past_key_values=cache,
                    cache_position=torch.arange(part.start, part.stop),
                )  # fmt: skip
            held = cache.layers[self.layer].values[0, ..., 0].numpy()
            kept.append((held[..., None] == np.arange(tokens)).any(1))
        if getattr(module, "masked_key_indices", None) is not None:  # AdaKVPress evicts nothing: it masks
            _, head, position = module.masked_key_indices
            kept[-1][head.numpy(), position.numpy()] = False
        return np.stack(kept)


@dataclass
class SlidingWindow:
    """A layer of transformers' caches: ``DynamicSlidingWindowLayer`` or ``StaticSlidingWindowLayer``."""

    window: int
    static: bool = False

    def __call__(self, queries, keys, values, prompt):
        """As `check_kept` calls it."""
        import torch
        from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

        tokens, kv_heads, _ = keys.shape
        numbers = torch.arange(
            1.0, tokens + 1
        )  # the position of each key, from 1; 0 is an empty slot of the static layer
        states = numbers[None, None, :, None].expand(1, kv_heads, -1, -1)
        layer = StaticSlidingWindowLayer(tokens, self.window) if self.static else DynamicSlidingWindowLayer(self.window)
        kept = []
        for part in steps(tokens, prompt):
            place = {"cache_position": torch.arange(part.start, part.stop)}  # transformers below 5.3 needs it
            layer.update(states[:, :, part], states[:, :, part], place)
            kept.append((layer.keys[0] == numbers).any(1).numpy())
        return np.stack(kept)


@dataclass
class KeysValues:
    """A cache of awslabs' keys_values, which evicts a key only when the next token is read.

    The cache has chosen the slot of the next token already. In a full cache, the key in that slot counts as evicted
    here, so that with ``length`` slots ``length - 1`` keys are kept.
    """

    name: str
    length: int
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, queries, keys, values, prompt):
        """As `check_kept` calls it."""
        import torch
        from keys_values.kvcache.base import KVCacheParams
        from keys_values.kvcache.test_utils import create_kv_cache

        tokens, kv_heads, group, head_dim = queries.shape
        params = KVCacheParams(
            max_batch_size=1, n_query_groups=kv_heads, cache_length=self.length, head_size=head_dim,
            n_head=kv_heads * group, dtype=torch.float32,
        )  # fmt: skip
        cache, kept = create_kv_cache(self.name, params, **self.options), []
        arrays = (x.reshape(tokens, -1, head_dim).swapaxes(0, 1)[None] for x in (queries, keys, values))
        q, k, v = map(torch.from_numpy, arrays)
        for part in steps(tokens, prompt):
            ids = torch.zeros(1, part.stop - part.start, dtype=torch.long)
            cache(query=q[:, :, part], key=k[:, :, part], value=v[:, :, part], token_idx=ids)
            held, leaves = cache.token_positions()[0].numpy(), cache.next_positions(1)[0, :, 0].numpy()
            kept.append(np.zeros((kv_heads, tokens), bool))
            for row, mine, slot in zip(kept[-1], held, leaves, strict=True):
                row[np.delete(mine, slot) if len(mine) == self.length else mine] = True
        return np.stack(kept)
