"""Checkpoints as Hugging Face writes them: a directory with ``config.json``, safetensors files and a tokenizer.

Every key of ``config.json`` is used as transformers 5 uses it for the family (`corm_jax.model.families`), is known to
have no influence on the numbers, or is refused by name. So is every tensor, and every safetensors file.
"""

import re
import reprlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from corm_jax.core.positions import Rope
from corm_jax.errors import CheckpointError
from corm_jax.files import read_json
from corm_jax.model import directory_tokenizer
from corm_jax.model.families.family import Family
from corm_jax.model.families.gemma import Gemma2, Gemma3
from corm_jax.model.families.gpt import GPT2, OPT, Bloom, GPTNeoX
from corm_jax.model.families.llama import Llama, Mistral, Phi3, Qwen2, Qwen3
from corm_jax.model.schema import Schema
from corm_jax.model.source import Source, Tensor, for_context
from corm_jax.model.transformer import Config

FAMILIES: dict[str, type[Family]] = {
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "phi3": Phi3,
    "gemma2": Gemma2,
    "gemma3_text": Gemma3,
    "gpt2": GPT2,
    "gpt_neox": GPTNeoX,
    "opt": OPT,
    "bloom": Bloom,
}
"""By the ``model_type`` of ``config.json``."""

WAY_OUT = f"the families that are read are {', '.join(FAMILIES)}, in a directory as transformers saves it"


class Index(Schema):
    """``model.safetensors.index.json``: which file holds which tensor."""

    weight_map: dict[str, str]

    @classmethod
    def harmless(cls, key: str) -> bool:
        """Whether a key cannot change what the model computes."""
        return key == "metadata"


class _Kind(Schema):
    """What of a ``config.json`` says of which family it is."""

    model_type: str

    @classmethod
    def harmless(cls, key: str) -> bool:
        """All other keys are the family's."""
        return True


def read_config(path: Path) -> Family:
    """A ``config.json``.

    Raises:
      CheckpointError: if it is of no family that is known here, or says something that the decoder does not do.
    """
    kind = read_json(path, _Kind, "config", WAY_OUT, CheckpointError).model_type
    if kind not in FAMILIES:
        raise CheckpointError(f"{path} has 'model_type' = {reprlib.repr(kind)}: {WAY_OUT}")
    return read_json(path, FAMILIES[kind], "config", WAY_OUT, CheckpointError)


def open_directory(path: Path, name: str, context: int | None = None) -> Source:
    """Opens a directory as Hugging Face writes it.

    Args:
      context: how many tokens will be read at most, see `corm_jax.load`.

    Raises:
      CheckpointError: for a file that is missing, damaged or not used, or a config that the decoder cannot follow.
    """
    found = read_config(path / "config.json")
    config, notes = for_context(found.config(), context)
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path} has an adapter_config.json, and adapters are not read: merge the adapter into the weights"
        )
    notes += [
        f"{path / 'config.json'} has no {key}: {value} is assumed, as transformers does"
        for key, value in found.assumed().items()
    ]
    tensors = _open_tensors(path, found.buffers)
    for key in [key for key in tensors if key.endswith("rotary_emb.inv_freq")]:
        _check_frequencies(path, key, tensors.pop(key), config)
    model = found.names.model
    head, embedding = f"{model['head']}.weight", f"{model['embedding']}.weight"
    if not any(key.startswith(found.base) for key in tensors):  # saved without a head
        tensors = {key if key == head else found.base + key: tensor for key, tensor in tensors.items()}
    if config.tied and head in tensors:
        config, untied = _untie(path, config, tensors, head, embedding)
        notes += untied
    return Source(
        name, config, tensors, lambda: directory_tokenizer.from_directory(path), notes, partial(_places, found)
    )


def _places(family: Family, config: Config):
    return family.names.places(config)


def _open_tensors(path: Path, buffers: re.Pattern | None) -> dict[str, Tensor]:
    """All tensors of a directory that hold parameters, none of them read yet."""
    index = path / "model.safetensors.index.json"
    weight_map: dict[str, str] = {}
    files = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index, Index, "index", WAY_OUT, CheckpointError).weight_map
        files = sorted(set(weight_map.values()))
    for file in files:
        if not re.fullmatch(r"[\w.,=+ -]{1,200}\.safetensors", file):
            raise CheckpointError(f"{index} names {file[:80]!r}, which is no safetensors file in its own directory")
    for file in sorted(path.glob("*.safetensors")):
        if file.name not in files and not file.name.startswith("."):
            owner = index.name if index.exists() else "a checkpoint in one file"
            raise CheckpointError(f"{path} has {file.name}, which is no part of {owner}: move it elsewhere")
    tensors: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    for file in files:
        for key, tensor in _open_safetensors(path / file, buffers).items():
            if key in tensors:
                raise CheckpointError(f"{path}: tensor {key!r} is both in {owners[key]} and in {file}")
            tensors[key], owners[key] = tensor, file
    for key, file in weight_map.items():
        if owners.get(key) != file and not (buffers and buffers.search(key)):
            raise CheckpointError(f"{index} says that tensor {key!r} is in {file}, where it is not")
    return tensors


DTYPES = ("F64", "F32", "F16", "BF16")


def _open_safetensors(file: Path, buffers: re.Pattern | None) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise CheckpointError(
            f"{file.parent} lacks {file.name}: only safetensors are read; download or convert the weights"
        )
    try:
        opened = safe_open(file, framework="numpy")
        tensors = {}
        for key in opened.keys():  # noqa: SIM118
            if buffers and buffers.search(key):
                continue
            part = opened.get_slice(key)
            if part.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"{file}: tensor {key!r} has dtype {part.get_dtype()}: only {', '.join(DTYPES)} are supported; "
                    "take the unquantised checkpoint, or a GGUF file"
                )
            tensors[key] = Tensor(tuple(part.get_shape()), lambda key=key: opened.get_tensor(key))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from None
    return tensors


def _check_frequencies(path: Path, key: str, tensor: Tensor, config: Config) -> None:
    """Raises if frequencies that an older transformers saved are not those of the config, scaled or not."""
    rounding = {np.dtype(np.float16): 0.05, np.dtype(jnp.bfloat16): 0.01}
    stored, rope = tensor.read(), config.rope
    plain = None if rope is None else Rope(theta=rope.theta, rotated=rope.rotated)
    for one in (rope, plain):
        expected = np.zeros(0) if one is None else one.frequencies(config.head_dim)
        if stored.shape == expected.shape and np.allclose(
            stored.astype(np.float32), expected, rtol=rounding.get(stored.dtype, 1e-4), atol=1e-7
        ):
            return
    raise CheckpointError(
        f"{path}: tensor {key!r} = {reprlib.repr(stored.ravel().tolist())} contradicts config.json, where rope_theta = "
        f"{rope and rope.theta} and head_dim = {config.head_dim}: correct these, or remove the tensor"
    )


def _untie(
    path: Path, config: Config, tensors: dict[str, Tensor], head: str, embedding: str
) -> tuple[Config, list[str]]:
    """What transformers does with a head in the file of a model whose config ties it to the embedding."""
    if embedding not in tensors:
        tensors[embedding] = tensors.pop(head)
        return config, []
    own, shared = tensors[head], tensors[embedding]
    if own.shape == shared.shape and np.array_equal(own.read(), shared.read()):
        del tensors[head]
        return config, []
    note = f"{path}: config.json ties the head to the embedding, but {head!r} differs from it: the head is used"
    return replace(config, tied=False), [note]


def from_hub(name: str) -> Path:
    """The directory of a hub id's files, downloaded unless the hub library's cache has them.

    Raises:
      CheckpointError: if they cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = [*directory_tokenizer.FILES, "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"model {name!r} is no local path and could not be had from the hub: {reason}") from None
