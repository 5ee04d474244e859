"""Tokenizers: the same ids, the same ends and the same conversations, whichever file a model comes from."""

import pytest
from tokenizers import processors

from corm_jax.tokenizer import Tokenizer
from tests.test_checkpoint import byte_level_tokenizer

TEXT = "It was the best of times — 日本"


def template(single):
    return processors.TemplateProcessing(
        single=single, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2), ("<|endoftext|>", 0)]
    )


@pytest.mark.parametrize(
    ("post_processor", "begin", "close"),
    [
        (None, [], []),
        (processors.ByteLevel(trim_offsets=False), [], []),
        (template("$A"), [], []),
        (template("<|im_start|> $A"), [1], []),
        (template("<|endoftext|> <|im_start|> $A <|im_end|>"), [0, 1], [2]),
        (processors.Sequence([processors.ByteLevel(), template("$A <|im_end|>")]), [], [2]),
        (processors.BertProcessing(("<|im_end|>", 2), ("<|im_start|>", 1)), [1], [2]),
        (processors.RobertaProcessing(("<|im_end|>", 2), ("<|im_start|>", 1)), [1], [2]),
    ],
)
def test_what_stands_around_a_text(post_processor, begin, close):
    inner = byte_level_tokenizer()
    if post_processor is not None:
        inner.post_processor = post_processor
    tokenizer = Tokenizer(inner, ())
    assert (tokenizer.begin, tokenizer.close) == (begin, close)
    words = tokenizer.encode(TEXT, special=False)
    assert words == byte_level_tokenizer().encode(TEXT).ids
    assert tokenizer.encode(TEXT) == [*begin, *words, *close]
    assert tokenizer.encode("") == [*begin, *close]
