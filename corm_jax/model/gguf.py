"""GGUF files (llama.cpp) as a checkpoint, dequantised to float32.

Every key of the metadata is used as llama.cpp uses it for its architecture (`corm_jax.model.architectures`), describes
the file, belongs to the tokenizer, or is refused by name. So is every tensor.
"""

import math
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from corm_jax.errors import CheckpointError
from corm_jax.files import first_error
from corm_jax.model.architectures.architecture import Architecture
from corm_jax.model.architectures.gemma import Gemma2, Gemma3
from corm_jax.model.architectures.gpt import GPT2, Bloom, GPTNeoX
from corm_jax.model.architectures.llama import Llama, Phi3, Qwen2, Qwen3
from corm_jax.model.gguf_tokenizer import from_gguf
from corm_jax.model.source import Source, Tensor, for_context

ARCHITECTURES: dict[str, type[Architecture]] = {
    "llama": Llama,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "phi3": Phi3,
    "gemma2": Gemma2,
    "gemma3": Gemma3,
    "gpt2": GPT2,
    "gptneox": GPTNeoX,
    "bloom": Bloom,
}
"""By the field ``general.architecture``. Mistral's files are of the architecture ``llama``."""

_WAY_OUT = "convert the model again, or load its Hugging Face directory"


def read_metadata(path: Path, fields: dict[str, Any]) -> Architecture:
    """The metadata of a file.

    Raises:
      CheckpointError: if it is of no architecture that is known here, or says something that the decoder does not do.
    """
    kind = fields.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} has 'general.architecture' = {reprlib.repr(kind)}: only {', '.join(ARCHITECTURES)} are read"
        )
    try:
        return ARCHITECTURES[kind].model_validate(fields)
    except ValidationError as error:
        raise CheckpointError(f"the metadata of {path} cannot be used: {first_error(error)}: {_WAY_OUT}") from None


def open_gguf(path: Path, name: str, context: int | None = None) -> Source:
    """Opens a GGUF file.

    Args:
      context: how many tokens will be read at most, see `corm_jax.load`.

    Raises:
      CheckpointError: if the file is damaged, of another architecture, lacks a field or says something that the
        decoder does not do.
    """
    fields, tensors = _read(path)
    found = read_metadata(path, fields)
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path}: tensor 'token_embd.weight' is missing")
    rows, *rest = _shape(tensors["token_embd.weight"]) or (0,)
    if not rows or len(rest) != 1:
        raise CheckpointError(f"{path}: tensor 'token_embd.weight' has shape {(rows, *rest)}: it is no table of tokens")
    if found.vocab not in (None, rows):
        raise CheckpointError(
            f"{path}: {found.key('vocab')!r} = {found.vocab}, but 'token_embd.weight' has {rows} rows"
        )
    _check_kinds(path, tensors.values())
    divisors = _divisors(path, tensors, found)
    config, notes = for_context(found.config(rows, "output.weight" not in tensors, divisors), context)
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads} if found.interleaved else {}
    notes += [f"{path} has no {key}: {value} is assumed, as llama.cpp does" for key, value in found.assumed().items()]
    return Source(
        name,
        config,
        {
            key: Tensor(_shape(tensor), lambda tensor=tensor: _dequantise(tensor, heads))
            for key, tensor in tensors.items()
        },
        lambda: from_gguf(fields, path, rows),
        notes,
        found.names.places,
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata, and the tensors by name, of a file that is whole."""
    from gguf import GGUFEndian, GGUFReader

    class Reader(GGUFReader):
        """Reads through a plain array: slices of `numpy.memmap` take four times as long, ten seconds for Gemma."""

        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, value: np.ndarray) -> None:
            self._data = value.view(np.ndarray)

    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    try:
        reader = Reader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the reader raises whatever indexing, reshaping or converting damaged bytes raises
        raise CheckpointError(f"{path} is truncated or damaged, fetch it again: {error or type(error)}") from None
    if reader.endianess != GGUFEndian.LITTLE:
        raise CheckpointError(f"{path} is big-endian, which is not supported: convert it with gguf_convert_endian.py")
    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset < end:
            raise CheckpointError(f"{path} is damaged: tensor {tensor.name!r} lies over the one before it")
        end = tensor.data_offset + tensor.n_bytes
    if (left := reader.data.size - end) >= reader.alignment:
        raise CheckpointError(
            f"{path} is damaged: {left} bytes behind the last tensor belong to nothing "
            f"('general.alignment' = {reader.alignment})"
        )
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _check_kinds(path: Path, tensors: Iterable[Any]) -> None:
    """Raises for a type of numbers that cannot be dequantised."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    readable = {}
    for tensor in tensors:
        kind = tensor.tensor_type
        if kind not in readable:
            try:
                with np.errstate(all="ignore"):
                    dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
                readable[kind] = True
            except NotImplementedError:
                readable[kind] = False
        if not readable[kind]:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} has type {kind.name}, which is not supported: {_WAY_OUT}"
            )


def _divisors(path: Path, tensors: dict[str, Any], found: Architecture) -> dict[str, tuple[float, ...]]:
    """The tensors by which frequencies are divided, taken out of the others: all that the architecture has, or none."""
    there = {name: tensors.pop(name) for name in found.divisors if name in tensors}
    values = {}
    for name in found.divisors if there else ():
        if name not in there:
            raise CheckpointError(f"{path}: tensor {name!r} is missing, but {min(there)!r} is there")
        shape, expected = _shape(there[name]), (found.turned // 2,)
        if shape != expected:
            raise CheckpointError(f"{path}: tensor {name!r} has shape {shape}, where {expected} is expected")
        values[name] = tuple(_dequantise(there[name], {}).tolist())
        if bad := [value for value in values[name] if not (value > 0 and math.isfinite(value))]:
            raise CheckpointError(f"{path}: tensor {name!r} holds {bad[0]}, and frequencies are divided by it")
    return values


def _shape(tensor: Any) -> tuple[int, ...]:
    """Axes in Hugging Face's order, which is the reverse of GGUF's."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _dequantise(tensor: Any, heads: dict[str, int]) -> np.ndarray:
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # what comes out is checked for NaN and infinity
        value = dequantize(tensor.data, tensor.tensor_type)
    name = tensor.name.split(".")[-2]
    if name in heads:
        rows, columns = value.shape
        value = value.reshape(heads[name], -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return value
