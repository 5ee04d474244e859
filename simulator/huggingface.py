"""Traces of models of `transformers`: rotated queries and keys, and values, recorded where the model attends.

Each layer of such a model passes them to a function that its class or its ``attn_implementation`` names. `record` wraps
that function, so that rotations, norms and scales of any kind are those of the model, and compares the trace with what
the function returns.

>>> import torch, transformers
>>> config = transformers.LlamaConfig(
...     vocab_size=99, hidden_size=32, intermediate_size=64,
...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
... )
>>> record(transformers.LlamaForCausalLM(config), [3, 1, 4, 1, 5])
Trace(kind='qkv', model='LlamaForCausalLM', layers=2, steps=5, q_heads=4, kv_heads=2, head_dim=8)
"""

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np

from corm_jax.traces.arrays import TraceError, require
from corm_jax.traces.trace import Trace

CLOSE = 1e-3
"""The largest difference between the outputs of a layer and its trace, as a share of the largest value, in float32."""


def record(model: Any, tokens: Any, *, pieces: Sequence[str] | None = None) -> Trace:
    """The trace of a causal model of `transformers` while it reads a text with its full cache.

    The model may be on any device, in any float dtype, with any ``attn_implementation`` that can attend in float32;
    ``tests/test_trace_huggingface.py`` compares traces of Llama, Qwen3, Gemma2 and GPT-2 with the attentions that these
    return. As for these attentions, memory for heads x steps^2 numbers is needed.

    Args:
      model: such as ``AutoModelForCausalLM.from_pretrained(...)``. It is called once, without dropout.
      tokens: the ids of one text, ``[steps]`` or ``[1, steps]``: a list, an array or a tensor.
      pieces: the text of each token, for plots: ``tokenizer.convert_ids_to_tokens(tokens)``.

    Raises:
      TraceError: for tokens that are not one text; for a model in which no layer attends through that function; for
        attention other than ``softmax(scale * q . k)`` over all earlier tokens, such as with soft caps, sinks, biases,
        or windows that are shorter than the text.
    """
    import torch
    from transformers import AttentionInterface

    require(isinstance(model, torch.nn.Module), "model", "a model of transformers", model)
    ids = np.asarray(tokens.tolist() if hasattr(tokens, "tolist") else tokens)
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    good = ids.ndim == 1 and ids.size > 0 and ids.dtype.kind in "iu"
    require(good, "tokens", "the ids of one text, [steps] or [1, steps]", tokens)
    if not hasattr(AttentionInterface, "get_interface"):
        raise TraceError("this transformers is too old to record from: pip install -U transformers")
    layers: list[tuple[Any, ...]] = []
    found = AttentionInterface.get_interface

    def watched(self, name, default):
        attend = found(self, name, default)

        def attend_and_keep(module, query, key, value, mask=None, *others, **options):
            scale = float(options.get("scaling") or query.shape[-1] ** -0.5)
            q, k, v = (x.detach().float() for x in (query, key, value))
            _check(len(layers), module, attend, q, k, v, mask, scale, others, options)
            layers.append((q.cpu(), k.cpu(), v.cpu(), scale))
            return attend(module, query, key, value, mask, *others, **options)

        return attend_and_keep

    training = model.training
    try:
        model.eval()
        with torch.no_grad(), patch.object(AttentionInterface, "get_interface", watched):
            model(input_ids=torch.as_tensor(ids.astype(np.int64), device=model.device)[None], use_cache=False)
    finally:
        model.train(training)
    name = type(model).__name__
    if not layers:
        raise TraceError(f"no layer of {name} attends through transformers' AttentionInterface: use from_attention")
    q, k, v, scales = zip(*layers, strict=True)
    require(len(set(scales)) == 1, f"the scale of {name}", "the same in all layers: use from_attention", scales)
    path = getattr(model.config, "name_or_path", "") or name
    return Trace.from_qkv(q, k, v, heads_first=True, scale=scales[0], model=path, tokens=ids, pieces=pieces)


def _check(index: int, module, attend, q, k, v, mask, scale: float, others, options) -> None:
    """Raises unless the layer attends as a trace assumes: ``q, k, v [1, heads, steps, head_dim]`` in float32."""
    import torch

    where = f"layer {index} ({type(module).__name__})"
    try:
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        output = attend(module, q, k, v, mask, *others, **options)[0][0]
    except Exception as error:
        what = " ".join(str(error).split())[:160]
        raise TraceError(f"{where} cannot attend in float32: use attn_implementation='eager' ({what})") from None
    steps, group = q.shape[2], q.shape[1] // k.shape[1]
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    same = q.shape[2:] == k.shape[2:] and steps > 0
    if same:
        keys, values = (x[0].repeat_interleave(group, 0) for x in (k, v))
        logits = (scale * q[0] @ keys.mT).masked_fill(~causal, -torch.inf)
        expected = (logits.softmax(-1) @ values).transpose(0, 1)
        same = bool((output - expected).abs().max() <= CLOSE * v.abs().max())
    if not same:
        raise TraceError(
            f"{where} does not attend by softmax(scale * q . k) over all earlier tokens, as a trace does, but with a "
            "soft cap, sinks, a bias or a window, or to later tokens: if its attentions are causal and sum to 1, use "
            "attn_implementation='eager' and Trace.from_attention"
        )
