"""Checkpoints in every form, whole and damaged."""

import json
import shutil

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from corm_jax import CheckpointError
from corm_jax.model import checkpoint
from corm_jax.model.architectures.llama import NAMES
from corm_jax.model.families.llama import LAYER
from tests.test_model import hugging_face, logits_of, ours

TEXT = "It was the best of times, it was the worst of times. 'It's naïve,' said he; 12345 — 日本 \U0001f600\n\n  x"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    hugging_face(path, tie_word_embeddings=False)
    return path


@pytest.fixture
def copy(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def tokens(vocab=101):
    return np.random.default_rng(0).integers(0, vocab, (1, 40)).astype(np.int32)


def write_gguf(
    path, model, *, kind=gguf.GGMLQuantizationType.F32, divisors=None, metadata=None, vocabulary=True, **changes
):
    """A GGUF file with a model's weights, q and k interleaved as llama.cpp's converter does it.

    ``metadata`` has keys to add, to replace or, if None, to leave out.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if vocabulary:
        add_vocabulary(writer)
    for key, value in (metadata or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            types = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
            writer.add_key_value(key, value, gguf.GGUFValueType[types[type(value)]])
    names = {LAYER[part]: name for part, name in NAMES.layer.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, value in {**model.state_dict(), **changes}.items():
        value = value.float().numpy() if hasattr(value, "numpy") else value
        parts = name.split(".")
        if parts[1] == "layers":
            short = names[".".join(parts[3:-1])]
            name = f"blk.{parts[2]}.{short}.weight"
            if short in heads:
                value = value.reshape(heads[short], 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts[-2]] + ".weight"
        if kind is gguf.GGMLQuantizationType.F32 or value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_tokenizer(digits=True):
    """A small byte-level BPE as Hugging Face builds it for SmolLM2, trained here."""
    inner = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]) if digits else byte_level
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT * 3, "best worst times of it"] * 4, trainer)
    return inner


def add_vocabulary(writer):
    inner = byte_level_tokenizer()
    content = json.loads(inner.to_str())["model"]
    vocabulary = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def test_names_that_mean_nothing(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    for name, message in {
        "smollm3": "unknown model 'smollm3': give 'smollm2-135m', 'gemma-3-270m', a directory",
        str(tmp_path / "none.gguf"): "does not exist",
        str(tmp_path / "file.txt"): "is not a GGUF file or a checkpoint's directory",
        "x" * 5000: "is no path: .*File name too long",
        "~nobody-of-that-name/model": "is no path: Could not determine home directory",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(name)


def test_hub_ids_come_from_the_hubs_own_cache(directory, tmp_path, monkeypatch):
    """Offline, the hub library finds in its cache what an earlier run downloaded; what it lacks is a clear error."""
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / "abc"
    shutil.copytree(directory, snapshot)
    (tmp_path / "models--owner--tiny" / "refs").mkdir()
    (tmp_path / "models--owner--tiny" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = checkpoint.build(checkpoint.open_source("owner/tiny"))
    np.testing.assert_array_equal(logits_of(model, tokens()), logits_of(ours(directory), tokens()))
    with pytest.raises(CheckpointError, match="'owner/other' is no local path and could not be had from the hub"):
        checkpoint.load("owner/other")
