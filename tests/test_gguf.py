"""GGUF files: the same model as from Hugging Face's file, quantised, and damaged."""

import time

import gguf
import numpy as np
import pytest
import torch

from corm_jax import CheckpointError
from corm_jax.model import checkpoint, huggingface
from tests.test_checkpoint import tokens, write_gguf
from tests.test_model import LLAMA3, hugging_face, logits_of, ours


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return hugging_face(tmp_path_factory.mktemp("hf"))


def refusal(path):
    with pytest.raises(CheckpointError) as raised:
        ours(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_gguf_is_the_same_model(tmp_path):
    theirs = hugging_face(tmp_path / "hf", rope_parameters=LLAMA3, num_key_value_heads=3)
    frequencies = huggingface.read_config(tmp_path / "hf/config.json").rope.frequencies(8)
    divisors = (500000.0 ** -(np.arange(0, 8, 2) / 8) / frequencies).astype(np.float32)
    assert divisors.max() > 1.5
    path = write_gguf(tmp_path / "model.gguf", theirs, divisors=divisors)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens(), dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits_of(ours(path), tokens()), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "BF16"])
def test_gguf_is_dequantised(tmp_path, kind):
    theirs = hugging_face(tmp_path / "hf", hidden_size=64, intermediate_size=96, num_attention_heads=4)
    path = write_gguf(tmp_path / "model.gguf", theirs, kind=gguf.GGMLQuantizationType[kind])
    exact, rounded = (checkpoint.build(checkpoint.open_source(str(p))) for p in (tmp_path / "hf", path))
    first, second = (np.asarray(model.layers[1].attention.q.kernel[...]) for model in (exact, rounded))
    assert 0 < np.abs(first - second).max() < np.abs(first).max() / 127


def test_one_number_for_each_layer(tmp_path, theirs):
    """Keys that llama.cpp takes as a list: the layers are equal, or the file is refused."""
    plain = checkpoint.open_source(str(write_gguf(tmp_path / "plain.gguf", theirs, vocabulary=False))).config
    for key, value in (("feed_forward_length", 80), ("attention.head_count", 6), ("attention.head_count_kv", 2)):
        key = f"llama.{key}"
        path = write_gguf(tmp_path / "same.gguf", theirs, metadata={key: [value] * 3}, vocabulary=False)
        assert checkpoint.open_source(str(path)).config == plain
        for values in ([value, value, value * 2], [value] * 2):
            path = write_gguf(tmp_path / "other.gguf", theirs, metadata={key: values}, vocabulary=False)
            assert f"'{key}' = [{value}, " in refusal(path)


def test_divisors_and_a_factor_apply_together(tmp_path, theirs):
    divisors = np.array([1, 2, 3, 4], np.float32)
    path = write_gguf(
        tmp_path / "both.gguf", theirs, divisors=divisors, metadata={"llama.rope.scaling.factor": 4.0}, vocabulary=False
    )
    rope = checkpoint.open_source(str(path)).config.rope
    np.testing.assert_allclose(rope.frequencies(8), 10000.0 ** -(np.arange(0, 8, 2) / 8) / (4 * divisors), rtol=1e-5)


@pytest.mark.parametrize(
    ("divisors", "message"),
    [
        (np.ones(8, np.float32), "'rope_freqs.weight' has shape (8,), where (4,) is expected"),
        (np.ones((1, 4), np.float32), "'rope_freqs.weight' has shape (1, 4), where (4,) is expected"),
        (np.array([1, 1, 0, 1], np.float32), "'rope_freqs.weight' holds 0.0"),
        (np.array([1, -2, 1, 1], np.float32), "'rope_freqs.weight' holds -2.0"),
        (np.array([1, 1, 1, np.inf], np.float32), "'rope_freqs.weight' holds inf"),
        (np.array([np.nan, 1, 1, 1], np.float32), "'rope_freqs.weight' holds nan"),
        (np.ones(4, np.int32), "'rope_freqs.weight' has type I32, which is not supported"),
    ],
)
def test_divisors_that_cannot_be(tmp_path, theirs, divisors, message):
    assert message in refusal(write_gguf(tmp_path / "x.gguf", theirs, divisors=divisors, vocabulary=False))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm.weight", lambda x: x[None], "'output_norm.weight' has shape (1, 48), where (48,) is expected"),
        ("model.norm.weight", lambda x: x[:-1], "'output_norm.weight' has shape (47,), where (48,) is expected"),
        (
            "model.layers.1.mlp.down_proj.weight",
            lambda x: x.T.copy(),
            "'blk.1.ffn_down.weight' has shape (80, 48), where (48, 80)",
        ),
        (
            "model.layers.1.self_attn.q_proj.weight",
            lambda x: x[:, :24].copy(),
            "'blk.1.attn_q.weight' has shape (48, 24)",
        ),
        ("model.layers.2.mlp.up_proj.weight", lambda x: x[None], "'blk.2.ffn_up.weight' has shape (1, 80, 48)"),
        ("model.embed_tokens.weight", lambda x: x[0], "'token_embd.weight' has shape (48,): it is no table of tokens"),
        ("model.embed_tokens.weight", lambda x: x.astype(np.float64), "'token_embd.weight' has type F64"),
        ("model.norm.weight", lambda x: x.astype(np.int8), "'output_norm.weight' has type I8"),
        ("model.norm.weight", lambda x: x * np.inf, "'output_norm.weight' contains NaN or infinity"),
    ],
)
def test_tensors_of_another_shape_or_type(tmp_path, theirs, name, change, message):
    with np.errstate(all="ignore"):
        value = change(theirs.state_dict()[name].numpy())
    assert message in refusal(write_gguf(tmp_path / "x.gguf", theirs, vocabulary=False, **{name: value}))


def test_every_tensor_is_used(tmp_path, theirs):
    content = write_gguf(tmp_path / "whole.gguf", theirs, vocabulary=False).read_bytes()
    path = tmp_path / "other.gguf"
    for old, new, message in (
        (b"output_norm", b"output_nork", "'output_nork.weight' has no place"),
        (b"blk.1.attn_q", b"blk.7.attn_q", "'blk.7.attn_q.weight' has no place"),
        (b"blk.1.attn_q.weight", b"blk.01.attn_q.weigh", "'blk.01.attn_q.weigh' has no place"),
        (b"blk.1.attn_q.weight", b"blk.1.attn_q.scales", "'blk.1.attn_q.scales' has no place"),
    ):
        path.write_bytes(content.replace(old, new))
        assert message in refusal(path)
    assert "tensor 'blk.3.attn_norm.weight' is missing" in refusal(
        write_gguf(path, theirs, metadata={"llama.block_count": 4}, vocabulary=False)
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 10_000),
        ("llama.block_count", 2**31 - 1),
        ("llama.embedding_length", 2**31 - 2),
        ("llama.vocab_size", 2**31 - 1),
        ("llama.feed_forward_length", 2**31 - 1),
        ("llama.attention.head_count", 2**31 - 2),
    ],
)
def test_absurd_sizes_are_refused_at_once(tmp_path, theirs, key, value):
    path = write_gguf(tmp_path / "x.gguf", theirs, metadata={key: value}, vocabulary=False)
    started = time.monotonic()
    message = refusal(path)
    assert time.monotonic() - started < 5  # it takes 0.02 s; what is meant is that no such model is made
    assert key.split(".")[-1] in message or "'blk.3.attn_norm.weight' is missing" in message or "has shape" in message


def test_damaged_gguf(tmp_path, theirs):
    content = write_gguf(tmp_path / "whole.gguf", theirs).read_bytes()
    path = tmp_path / "damaged.gguf"
    for size in (4, 30, len(content) // 3, len(content) - 2000):
        path.write_bytes(content[:size])
        assert "truncated or damaged, fetch it again" in refusal(path)
    path.write_bytes(b"GGML" + content[4:])
    assert "is not a GGUF file" in refusal(path)
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


def test_other_bytes(tmp_path, theirs):
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "is big-endian" in refusal(path)
    # The last tensor of the table is made to lie where the one before it does.
    content = write_gguf(path, theirs, vocabulary=False).read_bytes()
    reader = gguf.GGUFReader(path)
    first, second = (int(tensor.field.parts[5][0]).to_bytes(8, "little") for tensor in reader.tensors[-2:])
    del reader
    at = content.rindex(second, 0, content.index(b"blk.2.ffn_down") + 400)
    path.write_bytes(content[:at] + first + content[at + 8 :])
    assert "lies over the one before it" in refusal(path)
