"""What families share: keys of ``config.json`` that change no number, and how the rest becomes a decoder's shape."""

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from corm_jax.model.places import Names
from corm_jax.model.schema import Schema
from corm_jax.model.transformer import Config

_ABOUT_THE_FILE = "_name_or_path name_or_path _commit_hash transformers_version transformers.js_config unsloth_version "
_ABOUT_THE_FILE += "unsloth_fixed is_llama_config dtype torch_dtype"  # every tensor says its own dtype

_TRAINING = (
    "initializer_range init_std attention_dropout hidden_dropout activation_dropout dropout layerdrop embd_pdrop "
)
_TRAINING += "resid_pdrop attn_pdrop classifier_dropout gradient_checkpointing max_sequence_length pretraining_tp"

_RUNNING = "use_cache return_dict use_return_dict output_attentions output_hidden_states output_scores torchscript "
_RUNNING += "return_dict_in_generate chunk_size_feed_forward attn_implementation _attn_implementation use_bfloat16 "
_RUNNING += "_attn_implementation_autoset _flash_attn_2_enabled is_decoder cache_implementation"

_OF_THE_TOKENIZER = "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id "
_OF_THE_TOKENIZER += "decoder_start_token_id tokenizer_class prefix"

_OF_CLASSIFIERS = "id2label label2id num_labels problem_type finetuning_task task_specific_params"

# Defaults of transformers' generate(); a call of ours says what it wants.
_OF_GENERATE = "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens do_sample "
_OF_GENERATE += "diversity_penalty early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eta_cutoff "
_OF_GENERATE += "epsilon_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id max_length "
_OF_GENERATE += "length_penalty max_new_tokens min_length no_repeat_ngram_size num_assistant_tokens num_beam_groups "
_OF_GENERATE += "num_assistant_tokens_schedule num_beams num_return_sequences remove_invalid_values suppress_tokens "
_OF_GENERATE += "repetition_penalty target_lookbehind temperature top_k top_p typical_p"

HARMLESS = frozenset(
    " ".join((_ABOUT_THE_FILE, _TRAINING, _RUNNING, _OF_THE_TOKENIZER, _OF_CLASSIFIERS, _OF_GENERATE)).split()
)
"""Keys of ``config.json`` that do not enter the forward pass of any family in transformers."""

ACTIVATIONS: dict[str, Any] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
Activation = Literal["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
"""Names of activations in transformers, and those of the decoder."""


class Family(Schema):
    """A ``config.json``. Field by field what transformers' own configuration of the family means by it.

    Attributes:
      names: how the family calls its tensors, as a model with a head is saved.
      base: what stands before all names but the head's; files of a model without a head lack it.
      buffers: matches tensors of old files that hold no parameters, but masks.
      own_harmless: further keys that do not change a number.
    """

    model_type: str

    names: ClassVar[Names]
    base: ClassVar[str] = "model."
    buffers: ClassVar[re.Pattern | None] = None
    own_harmless: ClassVar[frozenset[str]] = frozenset()

    only: ClassVar[dict[str, tuple]] = {
        "is_causal": (True,),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_encoder_decoder": (False,),
    }

    @classmethod
    def harmless(cls, key: str) -> bool:
        """Whether a key cannot change what the model computes."""
        return key in HARMLESS or key in cls.own_harmless

    def config(self) -> Config:
        """The decoder's shape."""
        raise NotImplementedError

    def assumed(self) -> dict[str, Any]:
        """Numbers that the file does not say, with the values that transformers takes instead."""
        return {}

    def _unsaid(self, *keys: str) -> dict[str, Any]:
        return {key: getattr(self, key) for key in keys if key not in self.model_fields_set}


def head_size(dim: int, heads: int, names: str = "hidden_size num_attention_heads") -> int:
    """Numbers in the key of a head, if heads share the width evenly.

    Raises:
      ValueError: if they do not; the keys of the two are named.
    """
    if dim % heads:
        dims, of_heads = names.split()
        raise ValueError(f"{dims!r} = {dim} is no multiple of {of_heads!r} = {heads}")
    return dim // heads


MOST_LAYERS = 10_000
"""A model with windows has no more layers: they are listed before the tensors are counted."""


def kinds_of(layers: int, local: Callable[[int], bool]) -> list[str]:
    """The list of kinds of layers, as transformers has it, from a function that says which layers have a window."""
    return ["sliding_attention" if local(i) else "full_attention" for i in range(min(layers, MOST_LAYERS))]


def windows(layer_types: Sequence[str] | None, window: int | None, layers: int) -> tuple[int | None, ...]:
    """The window of each layer, from transformers' list of their kinds; None for all the same.

    Raises:
      ValueError: for a list that does not fit.
    """
    if layers > MOST_LAYERS:
        raise ValueError(f"'num_hidden_layers' = {layers} is more than a model with windows may have, {MOST_LAYERS}")
    if layer_types is None:
        return () if window is None else (window,) * layers
    if len(layer_types) != layers:
        raise ValueError(f"'layer_types' has {len(layer_types)} entries for {layers} layers")
    local = [one == "sliding_attention" for one in layer_types]
    if any(local) and window is None:
        raise ValueError("'layer_types' has 'sliding_attention', and there is no 'sliding_window'")
    return tuple(window if one else None for one in local) if any(local) else ()
