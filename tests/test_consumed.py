"""Every key of a Llama's config and of GGUF metadata, changed one at a time.

Whatever the key and its value: the logits are those of transformers' model from the same config and weights, or the
checkpoint is refused with an error that names the key.
"""

import contextlib
import json
import typing

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging

from corm_jax import CheckpointError, Full
from corm_jax.model import checkpoint
from corm_jax.model.decoder import forward, make_caches
from corm_jax.model.families.family import HARMLESS
from corm_jax.model.gguf import ARCHITECTURES
from tests.test_checkpoint import write_gguf
from tests.test_model import LLAMA3, hugging_face

JUNK = [None, True, False, 0, -1, 3, 0.5, 1e400, 2**40, "x", [1], {}, {"a": 1}]
TOKENS = np.random.default_rng(0).integers(0, 53, (1, 24)).astype(np.int32)
SMALL = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROTATION = {**LLAMA3, "rope_theta": 50.0}  # with frequencies in all three bands of a head of 8
REFUSED = object()


class Pair:
    """One set of weights, read with any config by transformers and by us; logits are computed once a config."""

    def __init__(self, path, **options):
        self.model = hugging_face(path, **SMALL, **options)
        self.path, self.file = path, path / "config.json"
        self.config = json.loads(self.file.read_text())
        self.cache = {}
        self.logits = self.theirs(self.config)
        logits, self.shape = self.ours(path)
        np.testing.assert_allclose(logits, self.logits, atol=1e-4)

    def theirs(self, config):
        """Transformers' logits, or REFUSED where it raises or would have to draw weights at random."""
        self.file.write_text(json.dumps(config))
        try:
            model, report = LlamaForCausalLM.from_pretrained(self.path, dtype=torch.float32, output_loading_info=True)
            with torch.no_grad():
                logits = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
        except Exception:
            return REFUSED
        return REFUSED if any(report.values()) else logits

    def ours(self, path):
        """Our logits, without compiling anything, and the decoder's shape; or else the message of the error."""
        try:
            source = checkpoint.open_source(str(path))
            if source.config not in self.cache:
                self.cache[source.config] = self._logits(checkpoint.build(source))
        except CheckpointError as error:
            return None, str(error)
        return self.cache[source.config], source.config

    @staticmethod
    def _logits(model):
        policy = Full()
        caches = make_caches(model, policy, batch=1, capacity=24)
        with jax.disable_jit():
            x, *_ = forward(model, policy, caches, jnp.asarray(TOKENS), jnp.full(1, 24, jnp.int32), chunk=24)
            return np.asarray(model.logits(x))

    def check(self, config, *names):
        """Whether a config was used. It was refused by the name of one of the keys, or has transformers' logits."""
        self.file.write_text(json.dumps(config))
        logits, found = self.ours(self.path)
        if logits is None:
            assert any(name in found for name in names), f"{names} are not named: {found}"
            assert "\n" not in found
            return False
        expected = self.theirs(config)
        if expected is REFUSED:  # at most a type that transformers minds, in a key that changes no number
            assert found == self.shape, f"transformers refuses {config}"
        else:
            np.testing.assert_allclose(logits, expected, atol=1e-4, err_msg=str(config))
        return True


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("plain"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("llama3"), rope_parameters=ROTATION, rms_norm_eps=1e-3)


WRITTEN = set(LlamaConfig().to_dict())
OLDER = """
    rope_theta rope_scaling torch_dtype partial_rotary_factor original_max_position_embeddings sliding_window auto_map
    layer_types use_sliding_window max_window_layers is_causal attention_chunk_size per_layer_config quantization_config
    tie_last_hidden_states compression_config is_decoder add_cross_attention rope_interleaved is_llama_config qk_norm
    max_sequence_length embedding_multiplier residual_multiplier attention_multiplier logits_scaling clip_qkv norm_type
    final_logit_softcapping attn_logit_softcapping num_local_experts num_experts_per_tok layer_norm_eps use_qk_norm
    no_rope_layers parallel_residual query_pre_attn_scalar scale_embeddings use_bias unknown
"""
KEYS = WRITTEN | set(OLDER.split()) | set(GenerationConfig._get_default_generation_params()) | HARMLESS


@pytest.mark.slow
def test_every_key_of_a_config(plain, llama3):
    for key in sorted(KEYS):
        for value in (False, 3) if key in HARMLESS else JUNK:
            if key != "rms_norm_eps" or type(value) is not int:  # where we take 1 for 1.0, and transformers does not
                plain.check({**plain.config, key: value}, key, "'model.")
    for pair in (plain, llama3):
        for key in WRITTEN - HARMLESS:
            pair.check({name: value for name, value in pair.config.items() if name != key}, key, "'model.")


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"rms_norm_eps": 0.25}, True),
        ({"hidden_act": "swish"}, False),
        ({"head_dim": None, "num_key_value_heads": 2}, False),
        ({"rope_parameters": None, "rope_theta": 50.0}, True),
        ({"rope_parameters": None, "rope_theta": 100000}, True),
        ({"rope_parameters": {"rope_theta": 50.0}}, True),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 10000.0}}, True),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, True),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 0.5}, "rope_theta": 50.0}, True),
        ({"rope_parameters": LLAMA3}, True),
        ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3, "rope_theta": 500000}, True),
        ({"rope_parameters": None, "rope_scaling": LLAMA3}, True),
        ({"rope_scaling": {}, "rope_theta": 10000}, False),
        ({"max_position_embeddings": 17}, False),
        ({"torch_dtype": "bfloat16", "dtype": "float16"}, False),
        ({"pretraining_tp": 2, "pad_token_id": 5, "attention_dropout": 0.9, "use_cache": False}, False),
    ],
)
def test_keys_that_are_used(plain, changes, differs):
    """These are not refused, so that the test above cannot pass by refusing all."""
    config = {**plain.config, **changes}
    assert plain.check(config)
    assert (np.abs(plain.theirs(config) - plain.logits).max() > 1e-3) == differs


@pytest.mark.parametrize("place", ["rope_parameters", pytest.param("rope_scaling", marks=pytest.mark.slow)])
def test_every_key_of_the_rotation(llama3, place):
    config = {name: value for name, value in llama3.config.items() if name != "rope_parameters"}
    for key in sorted({*RopeParameters.__annotations__, "type", "alpha", "low_freq_wavelen"}):
        for value in [*JUNK, 16, "linear", "default", "llama3", "yarn"]:
            llama3.check({**config, place: {**ROTATION, key: value}}, key, "rope type")
        llama3.check({**config, place: {name: ROTATION[name] for name in ROTATION.keys() - {key}}}, key, "rope type")
    for key in ROTATION.keys() - {"rope_type"}:
        changed = {**config, place: {**ROTATION, key: 16 if isinstance(ROTATION[key], int) else ROTATION[key] * 1.5}}
        assert llama3.check(changed)
        assert np.abs(llama3.theirs(changed) - llama3.logits).max() > 1e-3


thetas = st.sampled_from([50.0, 10000.0, 500000])
whole = st.sampled_from(
    [
        {"rope_type": "default"},
        {"type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 2},
        {"rope_type": "linear", "type": "linear", "factor": 0.5, "rope_theta": 50.0},
        ROTATION,
        {**LLAMA3, "factor": 2.0},
        {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "original_max_position_embeddings")},
        {},
    ]
)
further = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn"]),
        "type": st.sampled_from(["default", "linear", "llama3"]),
        "rope_theta": thetas,
        "factor": st.sampled_from([0.5, 2, 8.0]),
        "low_freq_factor": st.sampled_from([0.5, 2, 8.0]),
        "original_max_position_embeddings": st.sampled_from([16, 32]),
        "partial_rotary_factor": st.sampled_from([0.5, 1.0]),
        "attention_factor": st.sampled_from([None, 2.0]),
    },
)
scalings = st.none() | whole | st.builds(lambda one, other: one | other, whole, further)
rotations = st.fixed_dictionaries(
    {},
    optional={
        "rope_parameters": scalings,
        "rope_scaling": scalings,
        "rope_theta": thetas,
        "original_max_position_embeddings": st.sampled_from([16, 32]),
        "partial_rotary_factor": st.sampled_from([0.5, 1.0]),
    },
)


@settings(max_examples=150)
@given(rotation=rotations)
def test_places_of_the_rotation_together(plain, rotation):
    """A rotation may stand in three places of a config, in two spellings."""
    config = {name: value for name, value in plain.config.items() if name != "rope_parameters"}
    names = [*rotation, *(key for part in rotation.values() if isinstance(part, dict) for key in part), "rope type"]
    plain.check({**config, **rotation}, *names)


def metadata_keys(group=gguf.Keys):
    """Every key that GGUF's constants know, as an architecture called llama has it."""
    for value in vars(group).values():
        if isinstance(value, str) and "." in value and value != group.__module__ and not value.startswith("gguf."):
            with contextlib.suppress(KeyError):
                yield value.format(arch="llama", id=0, name="x")
        elif isinstance(value, type):
            yield from metadata_keys(value)


def rope(**options):
    return {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, **options}}


# What a value means in transformers' words, for the keys that change numbers.
MEANING: dict[str, typing.Callable] = {
    "llama.attention.layer_norm_rms_epsilon": lambda value: {"rms_norm_eps": float(value)},
    "llama.rope.freq_base": lambda value: rope(rope_type="default", rope_theta=float(value)),
    "llama.rope.scaling.factor": lambda value: rope(factor=float(value) or 1.0),
    "llama.rope.scale_linear": lambda value: rope(factor=float(value) or 1.0),
}
UNWRITTEN = {
    "llama.rope.scale_linear",
    "llama.rope.scaling.type",
    "llama.unknown",
    "unknown",
    "quantize.imatrix.file",
    "split.count",
    "general.alignment_of_values",
}
OTHERS = {key for key in metadata_keys() if not key.startswith("tokenizer.")} | UNWRITTEN


@pytest.fixture(scope="module")
def file(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"

    def write(**changes):
        return str(write_gguf(path, plain.model, metadata=changes, vocabulary=False))

    return write


def test_gguf_constants_are_many():
    assert len(OTHERS) > 150
    assert {"llama.rope.scaling.factor", "adapter.type", "llama.attention.key_length", *MEANING} <= OTHERS


@pytest.mark.slow
def test_every_key_of_gguf_metadata(plain, file):
    values = (True, 0, 1, 3, 8, 0.5, 4.0, 1e400, "x", "linear", "yarn", [4, 4])
    llama = ARCHITECTURES["llama"]
    known = {field.alias for field in llama.model_fields.values()}
    known |= {key if key.startswith("split.") else f"llama.{key}" for key in llama.only}
    for key in sorted(OTHERS | known):
        for value in values if key in known else (0, 0.5, "x"):
            logits, found = plain.ours(file(**{key: value}))
            if logits is None:
                assert any(name in found for name in (key, "tensor 'blk.", "tensor 'token_embd", "alignment"))
                assert "\n" not in found
            else:
                changes = MEANING[key](value) if key in MEANING else {}
                expected = plain.theirs({**plain.config, **changes}) if changes else plain.logits
                np.testing.assert_allclose(logits, expected, atol=1e-4, err_msg=f"{key} = {value}")


@pytest.mark.parametrize(
    ("metadata", "changes"),
    [
        ({"llama.attention.layer_norm_rms_epsilon": 0.25}, {"rms_norm_eps": 0.25}),
        ({"llama.rope.freq_base": 50.0}, rope(rope_type="default", rope_theta=50.0)),
        ({"llama.rope.freq_base": None}, {}),
        ({"llama.rope.scale_linear": 4.0}, rope(factor=4.0)),
        ({"llama.rope.scaling.factor": 4.0}, rope(factor=4.0)),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "linear"}, rope(factor=4.0)),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 4.0}, rope(factor=4.0)),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "none"}, {}),
        ({"llama.rope.scaling.factor": 0.0, "llama.rope.scaling.type": "linear"}, {}),
        ({"llama.rope.dimension_count": 8, "llama.attention.key_length": 8, "llama.attention.value_length": 8}, {}),
        ({"llama.vocab_size": 53, "general.type": "model", "split.count": 1, "llama.expert_count": 0}, {}),
    ],
)
def test_metadata_that_is_used(plain, file, metadata, changes):
    """As llama.cpp has it: a factor without a type is linear, and type none ignores it."""
    config = {**plain.config, **changes}
    found, _ = plain.ours(file(**metadata))
    np.testing.assert_allclose(found, plain.theirs(config), atol=1e-4)
    assert (np.abs(found - plain.logits).max() > 1e-3) == bool(changes)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 2.0},
        {"llama.rope.scaling.factor": float("nan")},
        {"llama.rope.scaling.factor": float("inf")},
        {"llama.rope.scaling.factor": -4.0},
        {"llama.rope.dimension_count": 4},
        {"llama.attention.key_length": 8, "llama.attention.value_length": 4},
        {"split.count": 2},
        {"general.type": "adapter"},
        {"general.architecture": "granite"},
        {"general.architecture": None},
        {"general.quantization_version": 3},
        {"llama.vocab_size": 54},
        {"llama.attention.scale": 0.5},
        {"llama.logit_scale": 0.5},
        {"llama.attention.clamp_kqv": 8.0},
        {"llama.expert_count": 8},
        {"llama.attention.layer_norm_rms_epsilon": None},
        {"llama.context_length": None},
    ],
)
def test_metadata_that_is_refused(file, metadata):
    with pytest.raises(CheckpointError) as raised:
        checkpoint.open_source(file(**metadata))
    assert any(key in str(raised.value) for key in metadata)
