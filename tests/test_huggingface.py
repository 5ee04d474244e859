"""Directories as Hugging Face writes them: configs, tensors and an index that contradict themselves or each other."""

import contextlib
import json
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from transformers import LlamaForCausalLM

from corm_jax import CheckpointError, CheckpointWarning, CormError
from corm_jax.model import checkpoint, huggingface
from tests.test_checkpoint import byte_level_tokenizer, tokens
from tests.test_model import LINEAR, hugging_face, logits_of, ours

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    hugging_face(path, tie_word_embeddings=False)
    return path


@pytest.fixture
def copy(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def refusal(path):
    """The error of a checkpoint that is refused: one line, soon."""
    started = time.monotonic()
    with pytest.raises(CheckpointError) as raised:
        ours(path)
    assert time.monotonic() - started < 5  # it takes some 0.02 s; what is meant is that nothing large is made
    assert "\n" not in str(raised.value)
    return str(raised.value)


def theirs(path):
    with torch.no_grad():
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model(torch.tensor(tokens(), dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "has 'model_type' = 'mamba': the families that are read are llama, mistral,"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures.0: Input should be 'LlamaForCausalLM'"),
        ({"attention_bias": True}, "tensor 'model.layers.0.self_attn.q_proj.bias' is missing"),
        ({"hidden_act": "quick_gelu"}, "hidden_act: Input should be 'silu', 'swish', 'gelu'"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "rope_scaling.rope_type: Input should be"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "has no 'original_max_position_embeddings', which"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' = 0.5 is not supported for 'llama': only 1 is"),
        ({"rope_scaling": [LINEAR]}, "rope_scaling: Input should be an object, not [{"),
        ({"rope_scaling": "linear"}, "rope_scaling: Input should be an object, not 'linear'"),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "'rope_parameters' has no 'factor', which rope type 'linear' needs",
        ),
        ({"rope_scaling": LINEAR}, "'rope_parameters' and 'rope_scaling' contradict each other"),
        ({"rope_theta": 5e5}, "'rope_parameters.rope_theta' = 10000.0 and 'rope_theta' = 500000.0 contradict"),
        ({"rope_parameters": {**LINEAR, "type": "llama3"}}, "'rope_type' = 'linear' and 'type' = 'llama3' contradict"),
        ({"rope_parameters": {**LINEAR, "factor": float("inf")}}, "rope_parameters.factor: Input should be a finite"),
        (
            {"rope_parameters": {**LINEAR, "factor": 0}},
            "factor: must be a positive number between 1e-30 and 1e30, not 0",
        ),
        (
            {"rope_parameters": {**LINEAR, "factor": True}},
            "rope_parameters.factor: Input should be a valid number, not",
        ),
        ({"rope_parameters": {**LINEAR, "beta_fast": 32}}, "'beta_fast' = 32.0 has no meaning for rope type 'linear'"),
        ({"rope_parameters": None, "rope_theta": float("inf")}, "rope_theta: Input should be a finite number, not inf"),
        ({"rope_parameters": None, "rope_theta": True}, "rope_theta: Input should be a valid number, not True"),
        (
            {"rope_parameters": None, "rope_theta": 1e-30, "rope_scaling": {"type": "linear", "factor": 1e-30}},
            "not finite",
        ),
        ({"num_hidden_layers": None}, "num_hidden_layers: Input should be a valid integer, not None"),
        ({"hidden_size": -48}, "hidden_size: must be a positive whole number below 2 ** 31, not -48"),
        ({"hidden_size": 48.5}, "hidden_size: Input should be a valid integer, not 48.5"),
        ({"num_key_value_heads": 4}, "'num_attention_heads' = 6 is no multiple of 'num_key_value_heads' = 4"),
        ({"head_dim": None, "hidden_size": 50}, "'hidden_size' = 50 is no multiple of 'num_attention_heads' = 6"),
        ({"head_dim": 7}, "= 7 is odd"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config' = {'bits': 4} is unknown here"),
        ({"sliding_window": 4}, "'sliding_window' = 4 is unknown here and may change the numbers"),
        ({"is_causal": False}, "'is_causal' = False is not supported: only True is"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "'auto_map' = {'AutoModel': 'code.Model'} is unknown here"),
        ({"two\nlines": "a\nb"}, r"'two\nlines' = 'a\nb' is unknown here"),
        (
            {"intermediate_size": 81},
            "'model.layers.0.mlp.gate_proj.weight' has shape (80, 48), where (81, 48) is expected",
        ),
        ({"vocab_size": 400}, "'model.embed_tokens.weight' has shape (101, 48), where (400, 48) is expected"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: Input should be a valid boolean, not 1"),
        # Absurd sizes, before anything of the kind is made.
        ({"num_hidden_layers": 4}, "tensor 'model.layers.3.input_layernorm.weight' is missing"),
        ({"num_hidden_layers": 10_000}, "tensor 'model.layers.3.input_layernorm.weight' is missing"),
        ({"num_hidden_layers": 2**31 - 1}, "tensor 'model.layers.3.input_layernorm.weight' is missing"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers: must be a positive whole number below 2 ** 31"),
        ({"num_hidden_layers": 2}, "tensor 'model.layers.2.input_layernorm.weight' has no place"),
        (
            {"hidden_size": 2**31 - 2, "head_dim": 8},
            "'model.embed_tokens.weight' has shape (101, 48), where (101, 214748",
        ),
        ({"vocab_size": 2**31 - 1}, "'model.embed_tokens.weight' has shape (101, 48), where (2147483647, 48)"),
        ({"head_dim": 2**31 - 2}, "'model.layers.0.self_attn.q_proj.weight' has shape (48, 48), where (128849"),
    ],
)
def test_configs_that_are_refused(copy, changes, message):
    change_config(copy, **changes)
    assert message in refusal(copy)


LLAMA2 = """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false,
    "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}"""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # Vicuna
        {"_name_or_path": "vicuna-7b-v1.5", "max_length": 4096, "pad_token_id": 0, "max_sequence_length": 2048},
        {"temperature": 0.9, "top_p": 0.6, "tokenizer_class": "LlamaTokenizer", "attn_implementation": "eager"},
        # Llama 3.2
        {
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "mlp_bias": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "unsloth_fixed": True,
        },
        # SmolLM2
        {
            "is_llama_config": True,
            "rope_interleaved": False,
            "rope_theta": 100000,
            "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
        },
        # DeepSeek Coder
        {"rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000},
    ],
)
def test_configs_of_models_that_people_have(tmp_path, changes):
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(LLAMA2), **changes}))
    assert huggingface.read_config(tmp_path / "config.json").config().dim == 4096


def test_a_head_beside_a_tied_embedding(tmp_path):
    """As transformers has it: a head that differs is used, one that is equal is not kept twice."""
    hugging_face(tmp_path, tie_word_embeddings=True)
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    before = theirs(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    embedding = whole["model.embed_tokens.weight"]
    without = {key: value for key, value in whole.items() if value is not embedding}
    other = np.random.default_rng(0).normal(scale=0.3, size=embedding.shape).astype(np.float32)
    for tensors, tied, note in (
        ({**whole, "lm_head.weight": other}, False, "'lm_head.weight' differs from it: the head is used"),
        ({**whole, "lm_head.weight": embedding.copy()}, True, ""),
        ({**without, "lm_head.weight": embedding}, True, ""),
    ):
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        expected = theirs(tmp_path)
        assert (np.abs(expected - before).max() < 1e-6) == tied
        with pytest.warns(CheckpointWarning, match=note) if note else contextlib.nullcontext():
            model, _ = checkpoint.load(str(tmp_path))
        assert (model.head is None) == tied
        np.testing.assert_allclose(logits_of(model, tokens()), expected, atol=1e-4)
    save_file({**whole, "lm_head.weight": other[:50]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "'lm_head.weight' has shape (50, 48), where (101, 48) is expected" in refusal(tmp_path)


def test_what_is_assumed_is_said(copy):
    byte_level_tokenizer().save(str(copy / "tokenizer.json"))
    checkpoint.load(str(copy))  # without a warning, which would be an error here
    config = json.loads((copy / "config.json").read_text())
    for key in (
        "rms_norm_eps",
        "rope_parameters",
        "max_position_embeddings",
        "head_dim",
        "hidden_act",
        "attention_bias",
    ):
        del config[key]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.warns(CheckpointWarning) as found:
        model, _ = checkpoint.load(str(copy))
    assert [str(one.message).split("config.json has no ")[1] for one in found] == [
        "rms_norm_eps: 1e-06 is assumed, as transformers does",
        "max_position_embeddings: 2048 is assumed, as transformers does",
        "rope_theta: 10000.0 is assumed, as transformers does",
    ]
    np.testing.assert_allclose(logits_of(model, tokens()), theirs(copy), atol=1e-4)


def test_json_that_cannot_be_read(copy):
    index = copy / "model.safetensors.index.json"
    for path, what in ((index, "index"), (copy / "config.json", "config")):
        for content, reason in (
            (b"{", "Invalid JSON: EOF while parsing"),
            (b"[]", "Input should be an object, not []"),
            (b"", "Invalid JSON: EOF"),
            (b"\xff\xfe", "Invalid JSON"),
            (b'{"a": ' + b"[" * 100_000, "recursion limit exceeded"),
            (b'{"a": ' + b'{"b": ' * 100_000 + b"1" + b"}" * 100_001, "recursion limit exceeded"),
            (b'{"a": ' + b"9" * 10_000 + b"}", "number out of range"),
        ):
            path.write_bytes(content)
            message = refusal(copy)
            assert message.startswith(f"the {what} {path} cannot be used: ")
            assert reason in message
        path.unlink()
    assert f"cannot read the config {copy / 'config.json'}: No such file or directory" in refusal(copy)
    (copy / "config.json").mkdir()
    assert f"cannot read the config {copy / 'config.json'}: Is a directory" in refusal(copy)


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "int32", "int64", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"]
)
def test_dtypes_that_are_refused(copy, dtype):
    tensors = load_torch(copy / "model.safetensors")
    save_torch({**tensors, Q: tensors[Q].to(getattr(torch, dtype))}, copy / "model.safetensors")
    name = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64", "uint8": "U8", "bool": "BOOL"}
    assert f"tensor {Q!r} has dtype {name.get(dtype, dtype.replace('int', 'I'))}: only F64" in refusal(copy)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes_that_are_read(copy, dtype):
    tensors = {key: value.to(getattr(torch, dtype)) for key, value in load_torch(copy / "model.safetensors").items()}
    save_torch(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    q = ours(copy).layers[0].attention.q.kernel[...]
    assert q.dtype == np.float32
    np.testing.assert_array_equal(q.T, tensors[Q].to(torch.float32).numpy())


def test_numbers_that_a_dtype_cannot_hold(copy):
    def change(tensors):
        tensors[Q] = tensors[Q].astype(np.float64)
        tensors[Q][3, 4] = 1e39

    change_tensors(copy, lambda tensors: tensors[Q].__setitem__((3, 4), 1e6))
    assert np.isfinite(ours(copy, "bfloat16").layers[0].attention.q.kernel[...]).all()
    with pytest.raises(CheckpointError, match=f"'{Q}' contains NaN or infinity, or a number beyond float16"):
        ours(copy, "float16")
    change_tensors(copy, change)
    assert f"{Q!r} contains NaN or infinity, or a number beyond float32" in refusal(copy)
    for dtype in ("int8", "float64", "float8_e4m3fn", bool, None, "foo", torch.float32):
        with pytest.raises(CormError, match="a model's dtype is float32, bfloat16 or float16, not"):
            ours(copy, dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0], "has shape (48,), where (48, 48) is expected"),
        (lambda x: x[None], "has shape (1, 48, 48), where (48, 48) is expected"),
        (lambda x: x[0, 0], "has shape (), where (48, 48) is expected"),
        (lambda x: x[:40], "has shape (40, 48), where (48, 48) is expected"),
        (lambda x: x[:, :0], "has shape (48, 0), where (48, 48) is expected"),
        (lambda x: x * np.nan, "contains NaN or infinity"),
    ],
)
def test_tensors_of_another_shape(copy, change, message):
    change_tensors(copy, lambda tensors: tensors.update({Q: np.array(change(tensors[Q]))}))
    assert f"tensor {Q!r} {message}" in refusal(copy).replace(f"{Q!r} contains", f"tensor {Q!r} contains")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"])
def test_frequencies_of_older_files(copy, name, dtype):
    """They are compared with the config's, plain or scaled."""
    change_config(copy, rope_parameters=LINEAR)
    tensors = load_torch(copy / "model.safetensors")
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    for stored, fits in (
        (plain, True),
        (plain / 4, True),
        (plain / 2, False),
        (plain.sqrt(), False),
        (plain[:3], False),
    ):
        stored = stored.to(getattr(torch, dtype))
        save_torch({**tensors, name: stored}, copy / "model.safetensors", metadata={"format": "pt"})
        if fits:
            checkpoint.open_source(str(copy))
        else:
            assert f"tensor {name!r} = [" in refusal(copy)


def shard(path):
    """The directory's tensors in two files with an index, which is returned as a dictionary."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = {key: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, key in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({key: tensors[key] for key in tensors if files[key] == file}, path / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_index_and_files_agree(copy, directory):
    index = shard(copy)
    checkpoint.build(checkpoint.open_source(str(copy)))
    first, second = sorted(copy.glob("*.safetensors"))
    path = copy / "model.safetensors.index.json"

    def write(**changes):
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **changes}}))

    write(**{Q: {first.name: second.name, second.name: first.name}[index["weight_map"][Q]]})
    assert f"says that tensor {Q!r} is in" in refusal(copy)
    write(**{"model.layers.9.norm": first.name})
    assert "says that tensor 'model.layers.9.norm' is in" in refusal(copy)
    for name in ("../copy/" + first.name, "..", "", "a\0.safetensors", "a\n.safetensors", "x" * 5000, "model.bin"):
        write(**{Q: name})
        assert "which is no safetensors file in its own directory" in refusal(copy)
    write(**{Q: "model-00003-of-00002.safetensors"})
    assert "lacks model-00003-of-00002.safetensors" in refusal(copy)
    write(**{Q: 3})
    assert f"weight_map.{Q}: Input should be a valid string, not 3" in refusal(copy)
    # The same key twice: the last one counts, as for transformers, and is held to the files.
    text = json.dumps(index)
    entry = f'"{Q}": "{index["weight_map"][Q]}"'
    for wrong in (first.name, second.name):
        path.write_text(text.replace(entry, f'{entry}, "{Q}": "{wrong}"'))
        if wrong == index["weight_map"][Q]:
            checkpoint.open_source(str(copy))
        else:
            assert f"says that tensor {Q!r} is in {wrong}, where it is not" in refusal(copy)
    path.write_text(json.dumps({**index, "quantized": True}))
    assert "'quantized' = True is unknown here" in refusal(copy)
    path.write_text(json.dumps(index))
    # Tensors that are there twice, files that nothing names.
    other = first if index["weight_map"][Q] == second.name else second
    content = other.read_bytes()
    save_file({**load_file(other), Q: np.zeros((48, 48), np.float32)}, other)
    assert f"tensor {Q!r} is both in {first.name} and in {second.name}" in refusal(copy)
    other.write_bytes(content)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        shutil.copy(directory / "model.safetensors", copy / name)
        assert f"has {name}, which is no part of model.safetensors.index.json" in refusal(copy)
        (copy / name).unlink()
    path.unlink()
    assert f"has {first.name}, which is no part of a checkpoint in one file" in refusal(copy)


def test_damaged_directories(copy):
    change_tensors(copy, lambda tensors: tensors["model.norm.weight"].__setitem__(3, np.nan))
    assert "'model.norm.weight' contains NaN or infinity" in refusal(copy)
    change_tensors(copy, lambda tensors: tensors.pop("model.norm.weight"))
    assert "tensor 'model.norm.weight' is missing" in refusal(copy)
    change_tensors(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(48)}))
    assert "tensor 'model.layers.0.self_attn.q_proj.bias' has no place in the decoder" in refusal(copy)
    content = (copy / "model.safetensors").read_bytes()
    for damaged in (content[:-100], content[:20], b"", b"\xff" * 64):
        (copy / "model.safetensors").write_bytes(damaged)
        assert "damaged or not a safetensors file" in refusal(copy)
    (copy / "adapter_config.json").write_text("{}")
    assert "adapters are not read: merge the adapter into the weights" in refusal(copy)
    (copy / "adapter_config.json").unlink()
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    assert "lacks model.safetensors: only safetensors are read" in refusal(copy)


def test_a_config_without_a_head_of_its_own(copy):
    """transformers would draw a head at random, with a warning."""
    change_tensors(copy, lambda tensors: tensors.pop("lm_head.weight"))
    assert "tensor 'lm_head.weight' is missing" in refusal(copy)
    config = json.loads((copy / "config.json").read_text())
    del config["tie_word_embeddings"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "tensor 'lm_head.weight' is missing" in refusal(copy)
    change_config(copy, tie_word_embeddings=True)
    np.testing.assert_allclose(logits_of(ours(copy), tokens()), theirs(copy), atol=1e-4)
