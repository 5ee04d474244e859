"""Traces of models of `transformers`: rotated queries and keys, and values, recorded where the model attends.

Each layer of such a model passes them, with its scale, soft cap and window, to a function that its class or its
``attn_implementation`` names. `record` wraps that function, so that rotations, norms and scales of any kind are those
of the model, and compares the trace with what the function returns. BLOOM attends in code of its own, which is wrapped
too.

>>> import torch, transformers
>>> config = transformers.LlamaConfig(
...     vocab_size=99, hidden_size=32, intermediate_size=64,
...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
... )
>>> record(transformers.LlamaForCausalLM(config), [3, 1, 4, 1, 5])
Trace(kind='qkv', model='LlamaForCausalLM', layers=2, steps=5, q_heads=4, kv_heads=2, head_dim=8)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from corm_jax.traces.arrays import TraceError, require
from corm_jax.traces.trace import Trace

CLOSE = 1e-3
"""The largest difference between the outputs of a layer and its trace, as a share of the largest value, in float32."""


class _Layer(NamedTuple):
    """What a layer attended to: ``q, k, v [1, heads, steps, head_dim]`` of torch, in float32, and the form."""

    q: Any
    k: Any
    v: Any
    scale: float
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None
    window: int | None = None

    def probs(self) -> Any:
        """Attention as a trace states it: ``[heads, steps, steps]``."""
        import torch

        q, k = self.q[0], self.k[0].repeat_interleave(self.q.shape[1] // self.k.shape[1], 0)
        distance = torch.arange(q.shape[1], device=q.device)[:, None] - torch.arange(k.shape[1], device=q.device)
        logits = self.scale * q @ k.mT
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.slopes is not None:
            logits = logits - torch.tensor(self.slopes, device=q.device)[:, None, None] * distance
        seen = (distance >= 0) & (distance < (self.window or len(distance)))
        return logits.masked_fill(~seen, -torch.inf).softmax(-1)


def record(model: Any, tokens: Any, *, pieces: Sequence[str] | None = None) -> Trace:
    """The trace of a causal model of `transformers` while it reads a text with its full cache.

    The model may be on any device, in any float dtype, with any ``attn_implementation`` that can attend in float32;
    BLOOM has to be in float32, since it rounds its biases.
    ``tests/test_trace_huggingface.py`` compares traces of Llama, Qwen3, Mistral, Gemma 2 and 3, GPT-2, BLOOM and others
    with the attentions that these return. As for these attentions, memory for heads x steps^2 numbers is needed.

    Args:
      model: such as ``AutoModelForCausalLM.from_pretrained(...)``. It is called once, without dropout.
      tokens: the ids of one text, ``[steps]`` or ``[1, steps]``: a list, an array or a tensor.
      pieces: the text of each token, for plots: ``tokenizer.convert_ids_to_tokens(tokens)``.

    Raises:
      TraceError: for tokens that are not one text; for a model in which no layer attends through that function; for
        attention of a form that `corm_jax.traces.meta.Meta` does not state, such as with sinks, or with another soft
        cap in each layer.
    """
    import torch

    require(isinstance(model, torch.nn.Module), "model", "a model of transformers", model)
    ids = np.asarray(tokens.tolist() if hasattr(tokens, "tolist") else tokens)
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    good = ids.ndim == 1 and ids.size > 0 and ids.dtype.kind in "iu"
    require(good, "tokens", "the ids of one text, [steps] or [1, steps]", tokens)
    layers: list[_Layer] = []
    training = model.training
    try:
        model.eval()
        with torch.no_grad(), _interface(layers), _bloom(layers):
            model(input_ids=torch.as_tensor(ids.astype(np.int64), device=model.device)[None], use_cache=False)
    finally:
        model.train(training)
    name = type(model).__name__
    if not layers:
        raise TraceError(f"no layer of {name} attends through transformers' AttentionInterface: use from_attention")
    for field in ("scale", "softcap", "slopes"):
        values = {getattr(one, field) for one in layers}
        require(len(values) == 1, f"the {field} of {name}", "the same in all layers: use from_attention", values)
    first, path = layers[0], getattr(model.config, "name_or_path", "") or name
    q, k, v = ([getattr(one, axis) for one in layers] for axis in "qkv")
    form = {"scale": first.scale, "softcap": first.softcap, "slopes": first.slopes}
    form["windows"] = [one.window for one in layers]
    return Trace.from_qkv(q, k, v, heads_first=True, model=path, tokens=ids, pieces=pieces, **form)


def _interface(layers: list[_Layer]) -> Any:
    """Notes what layers pass to the functions of `transformers.AttentionInterface`."""
    from transformers import AttentionInterface

    if not hasattr(AttentionInterface, "get_interface"):
        raise TraceError("this transformers is too old to record from: pip install -U transformers")
    found = AttentionInterface.get_interface

    def watched(self, name, default):
        attend = found(self, name, default)

        def attend_and_keep(module, query, key, value, mask=None, *others, **options):
            scale = float(options.get("scaling") or query.shape[-1] ** -0.5)
            q, k, v = (x.detach().float() for x in (query, key, value))
            form = {"softcap": options.get("softcap"), "window": options.get("sliding_window")}
            one = _Layer(q, k, v, scale, **form)
            _check(len(layers), module, attend, one, mask, others, options)
            layers.append(one._replace(q=q.cpu(), k=k.cpu(), v=v.cpu()))
            return attend(module, query, key, value, mask, *others, **options)

        return attend_and_keep

    return patch.object(AttentionInterface, "get_interface", watched)


def _bloom(layers: list[_Layer]) -> Any:
    """Notes what layers of BLOOM attend to.

    Their bias is the slope times the position of the key, to which a softmax is the same as to ALiBi's.
    """
    import torch
    from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

    forward = BloomAttention.forward

    def watched(self, hidden_states, *others, **options):
        where = f"layer {len(layers)} (BloomAttention)"
        if hidden_states.dtype not in (torch.float32, torch.float64):
            raise TraceError(f"{where} rounds its biases to {hidden_states.dtype}: load the model in float32")
        found = forward(self, hidden_states, *others, **options)
        q, k, v = (x.detach().float() for x in self._reshape(self.query_key_value(hidden_states)))
        slopes = build_alibi_tensor(torch.ones(1, 2), self.num_heads, torch.float32)[:, 0, 1]
        one = _Layer(q, k, v, self.inv_norm_factor, slopes=tuple(slopes.tolist()))
        if q.shape[:3] != found[1].shape[:3] or (one.probs() - found[1][0]).abs().max() > CLOSE:
            raise TraceError(f"{where} attends otherwise than BLOOM: use Trace.from_attention")
        layers.append(one._replace(q=q.cpu(), k=k.cpu(), v=v.cpu()))
        return found

    return patch.object(BloomAttention, "forward", watched)


def _check(index: int, module, attend, one: _Layer, mask, others, options) -> None:
    """Raises unless the layer attends as the trace states, in float32."""
    where, (q, k, v) = f"layer {index} ({type(module).__name__})", one[:3]
    try:
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        output = attend(module, q, k, v, mask, *others, **options)[0][0]
    except Exception as error:
        what = " ".join(str(error).split())[:160]
        raise TraceError(f"{where} cannot attend in float32: use attn_implementation='eager' ({what})") from None
    same = q.shape[2:] == k.shape[2:] and q.shape[2] > 0
    if same:
        values = v[0].repeat_interleave(q.shape[1] // v.shape[1], 0)
        same = bool((output - (one.probs() @ values).transpose(0, 1)).abs().max() <= CLOSE * v.abs().max())
    if not same:
        raise TraceError(
            f"{where} does not attend by softmax(scale * q . k) over all earlier tokens or those in its window, with "
            "or without a soft cap, as a trace does, but with sinks or a bias, or to later tokens: if its attentions "
            "are causal and sum to 1, use attn_implementation='eager' and Trace.from_attention"
        )
