"""GGUF files (llama.cpp) as a checkpoint in Hugging Face's spelling, dequantised to float32.

Two things differ from Hugging Face. The rows of q and k are stored for interleaved pairs (x_0, x_1), (x_2, x_3), ...
where ours and Hugging Face's are (x_0, x_{d/2}), ...; they are put back. And Llama 3's frequency scaling comes as a
tensor of divisors rather than as parameters.
"""

from pathlib import Path
from typing import Any

import numpy as np

from corm_jax.checkpoint import Source
from corm_jax.errors import CheckpointError
from corm_jax.tokenizer import Tokenizer

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_gguf(path: Path, name: str) -> Source:
    """Opens a GGUF file of architecture ``llama``.

    Raises:
      CheckpointError: if the file is damaged, of another architecture, or lacks a field.
    """
    from gguf import GGUFReader

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    try:
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, tensors, path)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return Source(
        name,
        config,
        {
            _hugging_face(key): lambda key=key: _dequantise(path, tensors[key], heads)
            for key in tensors
            if key != "rope_freqs.weight"
        },
        lambda: Tokenizer.from_gguf(fields, path, config["vocab_size"]),
    )


def _config(fields: dict[str, Any], tensors: dict[str, Any], path: Path) -> dict[str, Any]:
    def need(key: str) -> Any:
        if key not in fields:
            raise CheckpointError(f"{path} lacks the field {key!r}")
        return fields[key]

    kind = need("general.architecture")
    if kind != "llama":
        raise CheckpointError(f"{path}: architecture {kind!r} is not supported: only 'llama' is")
    if fields.get("llama.expert_count"):
        raise CheckpointError(f"{path}: mixtures of experts are not supported")
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path}: tensor 'token_embd.weight' is missing")
    rope = {"rope_theta": fields.get("llama.rope.freq_base", 10000.0), "rope_type": "default"}
    if fields.get("llama.rope.scaling.type", "none") != "none":
        rope["rope_type"] = fields["llama.rope.scaling.type"]
        rope["factor"] = fields.get("llama.rope.scaling.factor")
    if "rope_freqs.weight" in tensors:
        rope["rope_type"] = "divisors"
        rope["divisors"] = tensors["rope_freqs.weight"].data.tolist()
    heads = need("llama.attention.head_count")
    return {
        "model_type": "llama",
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": need("llama.embedding_length"),
        "intermediate_size": need("llama.feed_forward_length"),
        "num_hidden_layers": need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length"),
        "rms_norm_eps": need("llama.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": need("llama.context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": rope,
    }


def _hugging_face(key: str) -> str:
    if key in _GLOBAL:
        return _GLOBAL[key]
    match key.split("."):
        case ["blk", layer, name, "weight"] if name in _LAYER:
            return f"model.layers.{layer}.{_LAYER[name]}.weight"
    return key  # reported by name when the model is built


def _dequantise(path: Path, tensor: Any, heads: dict[str, int]) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        value = dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{path}: {tensor.name!r} ({tensor.tensor_type.name}) cannot be read: {error}") from None
    name = tensor.name.split(".")[-2]
    if name in heads:
        rows, columns = value.shape
        value = value.reshape(heads[name], -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return value
