"""Causal language models of the package ``keras_hub`` on the JAX backend: Llama, Mistral, Qwen, Gemma, GPT-2, OPT.

keras-hub has a place where a server puts its own attention: layers that find a serving context give it queries, keys
and values, rotated at the positions that the context names. To them every token is a row by itself.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from functools import partial
from typing import Any

from jax.tree_util import Partial

from corm_jax.adapters.functions import Functions, with_windows
from corm_jax.errors import CormError
from corm_jax.model.decoder import Shape


def decoder(model: Any, *, context: int = 8192) -> Functions:
    """A `corm_jax.Decoder` of a causal language model of ``keras_hub``.

    Args:
      model: such as ``keras_hub.models.Llama3CausalLM.from_preset(...)``. The decoder holds its weights of now.
      context: positions that it was trained on. A sliding window that is not shorter counts as none.

    Raises:
      CormError: for another backend than JAX; and, when it reads, for a model that has no place for other attention.
    """
    import keras

    if keras.backend.backend() != "jax":
        raise CormError(f"keras runs on {keras.backend.backend()}: set KERAS_BACKEND=jax before it is imported")
    backbone, layers = model.backbone, model.backbone.transformer_layers
    names = ("num_query_heads", "num_heads", "num_attention_heads")
    heads = next(getattr(backbone, name) for name in names if hasattr(backbone, name))
    shape = Shape(
        vocab=backbone.vocabulary_size,
        layers=len(layers),
        heads=heads,
        kv_heads=getattr(backbone, "num_key_value_heads", heads),
        head_dim=getattr(backbone, "head_dim", None) or backbone.hidden_dim // heads,
        context=context,
    )
    enter = keras.Model(backbone.input["token_ids"], _hidden(layers[0].input))
    leave = keras.Model(_hidden(layers[-1].output), backbone.output)
    head = backbone.token_embedding
    made = Functions(
        shape,
        Partial(partial(_serving, enter), _weights(enter)),
        tuple(Partial(partial(_layer, layer, context), _weights(layer)) for layer in layers),
        Partial(partial(_logits, leave, head), _weights(leave), _weights(head)),
    )
    return with_windows(made)


def _hidden(tensors):
    """The hidden states, without the masks that are beside them."""
    from keras import tree

    return next(one for one in tree.flatten(tensors) if "float" in one.dtype)


def _weights(layer):
    return [one.value for one in layer.trainable_variables], [one.value for one in layer.non_trainable_variables]


def _serving(layer, weights, x, position, attention=None):
    """What a layer makes of tokens, each of which is a row by itself."""
    from keras_hub.src.vllm.context import vllm_context_scope

    with vllm_context_scope(attention, position.reshape(-1)):
        out, _ = layer.stateless_call(*weights, x.reshape(-1, 1, *x.shape[2:]))
    return out.reshape(*position.shape, -1)


def _layer(layer, context, weights, x, position, attend):
    found: list[Any] = []

    def attention(cache, q, k, v, scale, head_dim, heads, kv_heads, sliding_window=None, soft_cap=None):
        q, k, v = (one.reshape(*position.shape, -1, head_dim) for one in (q, k, v))
        window = None if (sliding_window or context) >= context else sliding_window
        try:
            found.append(attend(q, k, v, scale=scale, window=window, softcap=soft_cap))
        except CormError as error:
            found.append(error)
            raise
        return cache, found[0].reshape(position.size, -1)

    try:
        x = _serving(layer, weights, x, position, attention)
    except CormError:  # to whose words keras has added its own
        raise found[0] from None
    if not found:
        raise CormError(f"{type(layer).__name__} of keras_hub has no place for other attention")
    return x


def _logits(leave, head, weights, table, x):
    rows, _ = leave.stateless_call(*weights, x.reshape(1, -1, x.shape[-1]))
    return head.stateless_call(*table, rows, reverse=True)[0].reshape(*x.shape[:-1], -1)
