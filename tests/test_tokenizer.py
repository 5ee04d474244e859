"""Tokenizers: the same ids, the same ends and the same conversations, whichever file a model comes from."""

import json
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Inner
from transformers import AutoTokenizer

from corm_jax import CheckpointError, CormError
from corm_jax.errors import CheckpointWarning
from corm_jax.model import chat_render, checkpoint, directory_tokenizer, gguf_tokenizer
from corm_jax.model.chat import ChatTemplate
from corm_jax.model.gguf_tokenizer import WORDS
from corm_jax.model.tokenizer import Tokenizer
from tests.test_checkpoint import TEXT, byte_level_tokenizer, write_gguf
from tests.test_model import hugging_face

transformers.logging.set_verbosity_error()

TRAINED = {digits: byte_level_tokenizer(digits).to_str() for digits in (True, False)}
SIZE = Inner.from_str(TRAINED[True]).get_vocab_size()
FLAGS = st.fixed_dictionaries(
    dict.fromkeys(("special", "lstrip", "rstrip", "normalized", "single_word"), st.booleans())
)
CONTENTS = ("<think>", "</think>", "<|im_end|>", "ab", "the", " times", "é", "<s>", "</s>", "[PAD]", "x y", "<image>")
PARTS = (*CONTENTS, "<unk>", " ", "  ", "t", "he", "best", "of man", "\n", "日本", "'s 12", ".")
TEXTS = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)


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


def sentencepiece_like(pieces, form):
    """BPE with a token for each byte, in one of the forms in which Llama 2's tokenizer is saved."""
    vocabulary = {token: index for index, token in enumerate(("<unk>", "<s>", "</s>"))}
    for token in (*(f"<0x{byte:02X}>" for byte in range(256)), *"▁thebsofmi", *pieces):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    inner = Inner(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if form == "normalizer":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", form, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


LLAMA3_WORDS = (  # as Llama 3's tokenizer.json has them
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
PIECES = st.lists(
    st.sampled_from(("th", "he", "the", "▁t", "▁the", "be", "of", "▁▁", "▁o", "▁of", "mi", "est")), unique=True
)
INNERS = st.one_of(
    st.just(TRAINED[True]).map(Inner.from_str),
    st.builds(sentencepiece_like, PIECES, st.sampled_from(("normalizer", "first", "always"))),
)


@st.composite
def directories(draw):
    """Files of a directory: a tokenizer, and what the files beside it say."""
    inner = draw(INNERS)
    for content in draw(st.lists(st.sampled_from(CONTENTS), max_size=3, unique=True)):
        inner.add_tokens([AddedToken(content, **draw(FLAGS))])
    added = inner.get_added_tokens_decoder()
    framing = draw(st.sampled_from((None, "B $A", "$A B", "B $A B", "$A")))
    if framing:
        index = draw(st.sampled_from(sorted(added)))
        special = {"id": "B", "ids": [index], "tokens": [added[index].content]}
        inner.post_processor = processors.TemplateProcessing(single=framing, special_tokens=[special])
    if draw(st.booleans()):
        inner.enable_truncation(draw(st.integers(1, 8)))
    if draw(st.booleans()):
        inner.enable_padding(length=20, pad_id=1, pad_token="x")
    content = st.sampled_from(CONTENTS)
    token = content | st.builds(
        lambda content, flags: {"__type": "AddedToken", "content": content} | flags, content, FLAGS
    )
    optional = dict.fromkeys(("bos_token", "eos_token", "pad_token", "image_token"), token)
    optional |= {
        "additional_special_tokens": st.lists(token, max_size=2),
        "extra_special_tokens": st.lists(token, max_size=2) | st.dictionaries(st.just("own_token"), content),
        "added_tokens_decoder": FLAGS.map(
            lambda flags: {str(index): {"content": one.content} | flags for index, one in added.items()}
        ),
        "tokenizer_class": st.sampled_from(
            ("PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", "GPT2Tokenizer", None)
        ),
        "chat_template": st.just("{{ bos_token }}{{ messages[0].content }}"),
        "split_special_tokens": st.just(False),
        **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"), st.booleans()),
    }
    mapped = {
        "bos_token": token,
        "cls_token": content,
        "image_token": content,
        "additional_special_tokens": st.lists(content, max_size=2),
    }
    files = {
        "tokenizer.json": json.loads(inner.to_str()),
        "tokenizer_config.json": draw(st.fixed_dictionaries({}, optional=optional)),
        "special_tokens_map.json": draw(st.fixed_dictionaries({}, optional=mapped)),
        "config.json": {"model_type": "llama", "vocab_size": 10**6, "eos_token_id": 2},
    }
    for value in files["special_tokens_map.json"].values():
        if isinstance(value, dict):
            value.pop("__type")
    return {
        name: content
        for name, content in files.items()
        if name in ("tokenizer.json", "config.json") or draw(st.booleans())
    }


def save(folder, files):
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return Path(folder)


def opened(folder):
    """The tokenizer of a directory, and the warnings about it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tokenizer = directory_tokenizer.from_directory(folder)
    return tokenizer, [str(one.message) for one in said]


@settings(max_examples=80)
@given(directories(), st.lists(TEXTS, min_size=4, max_size=4))
def test_directories_give_the_ids_of_transformers(files, texts):
    """Or there is a warning: a class of transformers may build another tokenizer than the file holds."""
    with tempfile.TemporaryDirectory() as folder:
        ours, said = opened(save(folder, files))
        theirs = AutoTokenizer.from_pretrained(folder)
    if any("may not use all of tokenizer.json" in note for note in said):
        assert files["tokenizer_config.json"]["tokenizer_class"] in ("LlamaTokenizerFast", "GPT2Tokenizer")
        return
    assert ours.template.tokens == theirs.special_tokens_map
    assert ours.template.source == theirs.chat_template
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def fields_of(inner, kind, pre, begin, close, frame):
    """The same tokenizer as GGUF's fields, of which the file's name is a part: ``tokenizer.ggml.NAME``."""
    saved = json.loads(inner.to_str())
    vocabulary = sorted(inner.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    special = {token["content"]: token["special"] for token in saved["added_tokens"]}
    types = [(3 if special[token] else 4) if token in special else 1 for token, _ in vocabulary]
    fields = {"model": kind, "tokens": [token for token, _ in vocabulary], "token_type": types}
    if kind == "gpt2":
        fields |= {"pre": pre, "merges": [" ".join(merge) for merge in saved["model"]["merges"]]}
    else:
        fields["token_type"] = [
            2 if token == "<unk>" else 6 if token.startswith("<0x") else type_
            for token, type_ in zip(fields["tokens"], types, strict=True)
        ]
        fields |= {"scores": [-float(index) for index, _ in enumerate(vocabulary)], "unknown_token_id": 0}
        fields["add_space_prefix"] = True
    fields |= {"bos_token_id": begin, "eos_token_id": close, "add_bos_token": frame[0], "add_eos_token": frame[1]}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


@st.composite
def twins(draw):
    """A tokenizer of transformers, and the fields of a GGUF file of the same model."""
    kind, pre = draw(st.sampled_from((("gpt2", "gpt-2"), ("gpt2", "smollm"), ("gpt2", "llama-bpe"), ("llama", None))))
    inner = (
        Inner.from_str(TRAINED[pre == "smollm"]) if kind == "gpt2" else sentencepiece_like(draw(PIECES), "normalizer")
    )
    if pre == "llama-bpe":
        words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer, inner.model.ignore_merges = pre_tokenizers.Sequence([words, byte_level]), True
    there = {token.content for token in inner.get_added_tokens_decoder().values()}
    for content in draw(st.lists(st.sampled_from(CONTENTS), max_size=4, unique=True)):
        if content not in there:
            inner.add_tokens([AddedToken(content, special=draw(st.booleans()), normalized=False)])
    names = ("<|im_start|>", "<|im_end|>") if kind == "gpt2" else ("<s>", "</s>")
    ids = tuple(inner.token_to_id(name) for name in names)
    frame = draw(st.booleans()), draw(st.booleans())
    if any(frame):
        single = [names[0]] * frame[0] + ["$A"] + [names[1]] * frame[1]
        inner.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=list(zip(names, ids, strict=True))
        )
    fields = fields_of(inner, kind, pre, *ids, frame)
    for index, name in enumerate(draw(st.lists(st.sampled_from(("eot", "eom")), unique=True))):
        fields[f"tokenizer.ggml.{name}_token_id"] = index
    if draw(st.booleans()):
        inner.enable_truncation(draw(st.integers(1, 8)))
    if draw(st.booleans()):
        inner.enable_padding(length=20, pad_id=ids[1], pad_token=names[1])
    return inner, fields


@given(twins(), st.lists(TEXTS, min_size=4, max_size=4))
def test_a_gguf_file_and_a_directory_of_the_same_model_agree(twins, texts):
    inner, fields = twins
    ends = [
        fields[key] for key in (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")) if key in fields
    ]
    from_gguf = gguf_tokenizer.from_gguf(fields, Path("here"), len(fields["tokenizer.ggml.tokens"]))
    files = {"tokenizer.json": inner.to_str(), "generation_config.json": {"eos_token_id": ends}}
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_type": "llama", "vocab_size": 1000, "eos_token_id": 5}
        from_directory = directory_tokenizer.from_directory(save(folder, files | {"config.json": config}))
        theirs = AutoTokenizer.from_pretrained(folder)
    assert from_gguf.end == from_directory.end == tuple(dict.fromkeys(ends))
    assert (from_gguf.begin, from_gguf.close) == (from_directory.begin, from_directory.close)
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert from_gguf.encode(text) == from_directory.encode(text) == ids
        assert from_gguf.decode(ids) == from_directory.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_saved_truncation_and_padding_are_not_done(tmp_path):
    inner = byte_level_tokenizer()
    words = inner.encode(TEXT).ids
    inner.enable_truncation(5)
    inner.enable_padding(length=60, pad_id=0)
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert directory_tokenizer.from_directory(tmp_path).encode(TEXT) == words
    assert len(words) > 5


def byte_level_fields(**changes):
    inner = byte_level_tokenizer()
    fields = fields_of(inner, "gpt2", "smollm", 1, 2, (False, False))
    fields |= {f"tokenizer.{name.replace('__', '.')}": value for name, value in changes.items()}
    return {name: value for name, value in fields.items() if value is not ...}


def test_byte_level_vocabulary_from_gguf(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", hugging_face(tmp_path / "hf", vocab_size=SIZE))
    tokenizer = checkpoint.open_source(str(path)).tokenizer()
    inner = byte_level_tokenizer()
    text = f"<|im_start|>{TEXT}<|im_end|>"
    assert tokenizer.encode(text) == inner.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == TEXT
    assert tokenizer.end == (2,)
    stream = tokenizer.stream()
    assert "".join(piece for token in tokenizer.encode(text) for piece in stream.push([token])) == TEXT
    pieces = tokenizer.pieces(tokenizer.encode("<|im_start|>times — \U0001f600"))
    assert pieces[0] == "<|im_start|>"
    assert "".join(pieces[1:]).startswith("times")
    assert tokenizer.pieces([]) == []
    path = write_gguf(tmp_path / "other.gguf", hugging_face(tmp_path / "hf", vocab_size=SIZE + 1))
    with pytest.raises(CheckpointError, match=f"has {SIZE} tokens, but embeddings for {SIZE + 1}"):
        checkpoint.open_source(str(path)).tokenizer()


def test_types_of_tokens():
    """As in llama.cpp: unknown, control and user-defined ones are whole words; the last of them are not special."""
    fields = byte_level_fields()
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], "<normal>", "<odd>", "<control>", "<think>"]
    fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"], 1, 2, 3, 4]
    tokenizer = gguf_tokenizer.from_gguf(fields, Path("here"))
    assert tokenizer.encode("<odd><control><think>") == [SIZE + 1, SIZE + 2, SIZE + 3]
    assert SIZE not in tokenizer.encode("<normal>")
    assert tokenizer.decode(tokenizer.encode("a<odd><control><think>b<|im_end|>")) == "a<think>b"


def test_llama_3_ends_in_three_ways():
    """A GGUF file of Llama 3.1 Instruct names ``<|eot_id|>``; its Hugging Face directory lists three ids."""
    fields = byte_level_fields()
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    fields["tokenizer.ggml.tokens"] = [*tokens, "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    fields["tokenizer.ggml.token_type"] = [*types, 3, 3, 3]
    for end, ends in {SIZE: {SIZE}, SIZE + 2: {SIZE, SIZE + 1, SIZE + 2}}.items():
        tokenizer = gguf_tokenizer.from_gguf(fields | {"tokenizer.ggml.eos_token_id": end}, Path("here"))
        assert set(tokenizer.end) == ends
        assert tokenizer.end[0] == end


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabulary_from_gguf(tmp_path, prefix):
    """Against SentencePiece itself, on a model that it trains here."""
    (tmp_path / "text").write_text((TEXT + "\nThe time of the best man is the best time of man.\n") * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=345,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        split_digits=True,
        user_defined_symbols=["<think>"],
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    model = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "spm.model").read_bytes())
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in model.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    tokenizer = gguf_tokenizer.from_gguf(fields, tmp_path)
    for text in (TEXT, "the best  time", " of man is", "unseen: Ünïcödé ℵ", "a", "man <think>", ""):
        assert tokenizer.encode(text) == [1, *trained.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("the best  time")
    assert "".join(tokenizer.pieces(ids)) == "<s>" + " " * prefix + "the best  time"
    assert tokenizer.pieces(tokenizer.encode("ℵ"))[-3:] == ["\N{REPLACEMENT CHARACTER}"] * 3
    # Each stretch behind a special token begins as a text does, as in llama.cpp.
    assert tokenizer.encode("man<think>man") == [1, *trained.encode("man<think>"), *trained.encode("man")]
    for changes, message in {
        "scores": ([], "tokenizer.ggml.scores is missing"),
        "token_type": (
            [5 if piece.piece == "he" else piece.type for piece in model.pieces],
            "'he' has the type unused",
        ),
        "remove_extra_whitespaces": (True, "remove_extra_whitespaces = true is not supported"),
    }.items():
        value, message = message
        if changes == "scores":
            value = None
        with pytest.raises(CheckpointError, match=message):
            gguf_tokenizer.from_gguf({**fields, f"tokenizer.ggml.{changes}": value}, tmp_path)
    scores = [max(piece.score, -3.0) for piece in model.pieces]
    with pytest.raises(CheckpointError, match="the same score"):
        gguf_tokenizer.from_gguf({**fields, "tokenizer.ggml.scores": scores}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml__model": "bert"}, "model = 'bert' is not supported: only 'gpt2' and 'llama' are"),
        ({"ggml__model": 3}, "tokenizer.ggml.model is 3"),
        ({"ggml__model": ...}, "tokenizer.ggml.model is missing"),
        ({"ggml__tokens": ...}, "tokenizer.ggml.tokens is missing"),
        ({"ggml__tokens": ["a", "b", "a"]}, "tokens has 'a' twice"),
        ({"ggml__tokens": [1, 2]}, "tokenizer.ggml.tokens is"),
        ({"ggml__pre": "qwen2"}, "tokenizer.ggml.pre = 'qwen2' is not supported, only default, gpt-2"),
        ({"ggml__token_type": [1]}, f"token_type has 1 entries for {SIZE} tokens"),
        ({"ggml__token_type": [9] * SIZE}, "token_type has 9, which is not a type of token"),
        ({"ggml__scores": [0.0]}, f"scores has 1 entries for {SIZE} tokens"),
        ({"ggml__merges": ...}, "tokenizer.ggml.merges is missing"),
        ({"ggml__merges": ["a"]}, "here: "),
        ({"ggml__merges": ["a §§"]}, "here: "),
        ({"ggml__bos_token_id": 10**6}, f"bos_token_id = 1000000 is not the id of one of the {SIZE} tokens"),
        ({"ggml__eos_token_id": -1}, "eos_token_id = -1 is not the id"),
        ({"ggml__eot_token_id": "2"}, "tokenizer.ggml.eot_token_id is '2'"),
        ({"ggml__eos_token_id": True}, "tokenizer.ggml.eos_token_id is True"),
        ({"ggml__add_bos_token": 1}, "tokenizer.ggml.add_bos_token is 1"),
        ({"ggml__add_bos_token": True, "ggml__bos_token_id": ...}, "bos_token_id is missing, but add_bos_token asks"),
        ({"ggml__add_eos_token": True, "ggml__eos_token_id": ...}, "eos_token_id is missing, but add_eos_token asks"),
        ({"ggml__add_space_prefix": True}, "add_space_prefix = true is not supported with model = 'gpt2'"),
        ({"ggml__precompiled_charsmap": [1, 2]}, "'tokenizer.ggml.precompiled_charsmap' may change token ids"),
        ({"ggml__normalizer__lowercase": True}, "'tokenizer.ggml.normalizer.lowercase' may change token ids"),
        ({"ggml__ignore_merges": True}, "'tokenizer.ggml.ignore_merges' may change token ids"),
        ({"huggingface__json": "{}"}, "'tokenizer.huggingface.json' may change token ids"),
    ],
)
def test_vocabularies_that_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message) as refused:
        gguf_tokenizer.from_gguf(byte_level_fields(**changes), Path("here"))
    assert "here" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_a_vocabulary_leaves_out_is_said():
    fields = byte_level_fields(ggml__pre=..., ggml__add_bos_token=..., ggml__token_type=...)
    with pytest.warns(CheckpointWarning, match="pre = default, add_bos_token = false, token_type = normal"):
        tokenizer = gguf_tokenizer.from_gguf(fields, Path("here"))
    # As llama.cpp cuts words where nothing is said: punctuation and groups of three digits by themselves.
    cuts = [text for text, _ in tokenizer.inner.pre_tokenizer.pre_tokenize_str("it's (a) 12345 ½..,\n\n x")]
    assert cuts == ["it", "'", "s", "Ġ", "(", "a", ")", "Ġ", "123", "45", "Ġ", "Â½", "..,", "ĊĊ", "Ġx"]
    assert set(WORDS) == {"default", "gpt-2", "smollm", "llama-bpe", "llama-v3", "llama3"}
    with pytest.warns(CheckpointWarning, match="does not say which token ends a text"):
        assert gguf_tokenizer.from_gguf(byte_level_fields(ggml__eos_token_id=...), Path("here")).end == ()


@pytest.mark.parametrize(
    ("generation", "config", "end"),
    [
        (5, 7, (5,)),
        ([5, 6, 5], 7, (5, 6)),
        (None, 7, ()),  # as in transformers, config.json does not count where there is a generation_config.json
        (..., 7, (7,)),
        (..., [7, 8], (7, 8)),
        (..., None, ()),
        *((bad, 7, None) for bad in (True, "5", 5.0, -1, [], [[5]], {"a": 5}, [5, None], 400, [2, 10**30], "[5]")),
        *((..., bad, None) for bad in (True, "5", 5.5, -3, [], [True], 400)),
    ],
)
def test_ends_of_a_directory(tmp_path, generation, config, end):
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    save(tmp_path, {"config.json": {"vocab_size": 400, "eos_token_id": config}})
    if generation is not ...:
        save(tmp_path, {"generation_config.json": {"eos_token_id": generation}})
    if end is None:
        with pytest.raises(CheckpointError, match="eos_token_id"):
            directory_tokenizer.from_directory(tmp_path)
    else:
        tokenizer, said = opened(tmp_path)
        assert tokenizer.end == end
        assert ("does not say which token ends a text" in "".join(said)) == (not end)


def test_tokenizer_of_a_directory(tmp_path):
    hugging_face(tmp_path, vocab_size=SIZE)
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    _, tokenizer = checkpoint.load(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.end == (2,)
    good = {"tokenizer.json": byte_level_tokenizer().to_str()}
    nested = "[" * 10**5
    for files, message in (
        ({"generation_config.json": "{"}, "generation_config.json cannot be used: Invalid JSON"),
        ({"generation_config.json": nested}, "generation_config.json cannot be used: Invalid JSON"),
        ({"tokenizer.json": "{}"}, "tokenizer.json: the tokenizer is damaged"),
        ({"tokenizer.json": nested}, "tokenizer.json: the tokenizer is damaged"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json cannot be used"),
        ({"tokenizer_config.json": {"tokenizer_class": 3}}, "tokenizer_config.json cannot be used: tokenizer_class"),
        ({"tokenizer_config.json": {"bos_token": 3}}, "bos_token is 3, which is not a token"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": None}},
            "tokenizer_config.json cannot be used: added_tokens",
        ),
        ({"tokenizer_config.json": {"extra_special_tokens": [3]}}, "a special token is 3, which is not a token"),
        ({"tokenizer_config.json": {"bos_token": {"content": 3}}}, "the tokenizer is damaged"),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["a.b", None]}}}, "asks for code of the checkpoint"),
        ({"tokenizer_config.json": {"fast_tokenizer_files": ["tokenizer.4.json"]}}, "names other files"),
        ({"tokenizer_config.json": {"split_special_tokens": "yes"}}, "split_special_tokens"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}},
            "the token '<|im_end|>' has the id 2 in tokenizer.json, and 7 in a file beside it",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "x"}]}}, "without a name or a template"),
        ({"special_tokens_map.json": "3"}, "special_tokens_map.json cannot be used"),
        ({"added_tokens.json": {"<x>": "7"}}, "added_tokens.json must have an id for each token"),
    ):
        folder = shutil.copytree(tmp_path, tmp_path / "changed")
        with pytest.raises(CheckpointError, match=message.replace("|", "\\|")) as refused:
            directory_tokenizer.from_directory(save(folder, good | files))
        assert "\n" not in str(refused.value)
        shutil.rmtree(folder)
    inner = json.loads(byte_level_tokenizer().to_str())
    inner["model"]["dropout"] = 0.5
    with pytest.raises(CheckpointError, match="dropout = 0.5 makes ids random"):
        directory_tokenizer.from_directory(save(tmp_path, {"tokenizer.json": inner}))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer.json"):
        checkpoint.load(str(tmp_path))


def test_what_files_of_a_directory_say_differently_is_said(tmp_path):
    inner = byte_level_tokenizer()
    inner.save(str(tmp_path / "tokenizer.json"))
    save(tmp_path, {"config.json": {"eos_token_id": 2}})
    for config, message in (
        ({"add_bos_token": True}, "add_bos_token = true, but tokenizer.json puts nothing before a text"),
        ({"tokenizer_class": "GPT2Tokenizer"}, "for the class 'GPT2Tokenizer', transformers 5 may not use all of"),
        (
            {"tokenizer_class": "Qwen2TokenizerFast"},
            "for the class 'Qwen2Tokenizer', transformers 5 may not use all of",
        ),
    ):
        with pytest.warns(CheckpointWarning, match=message):
            directory_tokenizer.from_directory(save(tmp_path, {"tokenizer_config.json": config}))
    inner.post_processor = template("<|im_start|> $A")
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.warns(CheckpointWarning, match=r"but tokenizer.json puts <\|im_start\|> before a text"):
        directory_tokenizer.from_directory(save(tmp_path, {"tokenizer_config.json": {"add_bos_token": False}}))


def test_tokens_that_the_model_does_not_know(tmp_path):
    inner = byte_level_tokenizer()
    inner.save(str(tmp_path / "tokenizer.json"))
    said = {"pad_token": "[PAD]", "eos_token": "<|im_end|>"}
    save(tmp_path, {"config.json": {"vocab_size": SIZE, "eos_token_id": 2}, "tokenizer_config.json": said})
    tokenizer = directory_tokenizer.from_directory(tmp_path)
    assert tokenizer.encode(TEXT) == inner.encode(TEXT).ids
    with pytest.raises(CormError, match=rf"has the token '\[PAD\]', whose id {SIZE} is beyond the vocabulary"):
        tokenizer.encode("a [PAD]")
    with pytest.raises(CormError, match="is not Unicode text"):
        tokenizer.encode("a\udc80")


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|im_end|>" }}
{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{%- for message in messages %}
    {%- if message.role == "ipython" %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|im_end|>' }}
    {% generation %}{{ message | tojson }}{% endgeneration %}
{%- endfor %}
{%- set ns = namespace(count=0) %}{% for one in range(9) %}{% if one > 3 %}{% break %}{% endif %}
    {%- set ns.count = one %}
{%- endfor %}
{{- ns.count }}{{ dict(a=eos_token) | tojson }}{{ mask_token }}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n\\n' }}
{%- endif %}
"""


@pytest.mark.parametrize("source", [CHATML, LLAMA31], ids=["ChatML", "Llama 3.1"])
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "named", "folder"])
def test_conversations_are_those_of_transformers(tmp_path, source, place):
    inner = byte_level_tokenizer()
    inner.post_processor = template("<|endoftext|> $A")
    inner.save(str(tmp_path / "tokenizer.json"))
    said = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    files = {"config.json": {"model_type": "llama", "eos_token_id": 2}}
    if place == "tokenizer_config.json":
        said["chat_template"] = source
    elif place == "named":
        said["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source}]
    else:
        said["chat_template"] = "{{ 'not this' }}"  # files of their own come first
        files["chat_template.jinja"] = source
    if place == "folder":
        files["additional_chat_templates/tool_use.jinja"] = "x"
    save(tmp_path, files | {"tokenizer_config.json": said})
    tokenizer, theirs = directory_tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Name three rivers. ", " <|im_end|> naïve 日本 {{ 1 }} \n"):
        message = [{"role": "user", "content": text}]
        assert tokenizer.chat(text) == theirs.apply_chat_template(
            message, add_generation_prompt=True, return_dict=False
        )
    # Neither the beginning token is there twice, nor does the text lack one that the template writes.
    assert tokenizer.chat("a").count(0) == (source == LLAMA31)
    assert tokenizer.encode("a")[0] == 0


def test_the_conversation_of_a_gguf_file():
    fields = byte_level_fields(chat_template=CHATML, chat_template__tool_use="x", chat_templates=["tool_use"])
    tokenizer = gguf_tokenizer.from_gguf(fields, Path("here"))
    expected = "<|im_start|>system\nYou are SmolLM<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.chat("hi") == byte_level_tokenizer().encode(expected).ids
    fields["tokenizer.chat_template"] = "{{ bos_token }}-{{ eos_token }}-{{ pad_token }}"
    assert gguf_tokenizer.from_gguf(fields, Path("here")).template.render("") == "<|im_start|>-<|im_end|>-"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "FILE has no chat template: write the conversation into the prompt"),
        ({"tool_use": "x"}, "FILE has chat templates named tool_use, but no 'default'"),
        ({"default": 3}, "FILE must be text, not 3"),
        ("{% if %}", "FILE fails: Expected an expression"),
        ("{{ raise_exception('no\nsystem') }}", "FILE fails: no system: write"),
        ("{{ nothing.at.all }}", "FILE fails: 'nothing' is undefined"),
        ("{{ messages.append(1) }}", "FILE fails: .* unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "FILE fails: .* unsafe"),
        ("{% set ns = namespace(_a=1) %}", "FILE fails: .* underscore"),
        ("{% include '/etc/passwd' %}", "FILE fails: no loader"),
        ("{{ '\\ud800' }}", "is not Unicode text"),
        # Work without end, and memory without end.
        ("{% for a in range(10**9) %}{% endfor %}", "FILE fails: Range too big"),
        ("{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}", "takes too long"),
        ("{{ 'x' * 10**10 }}", "FILE fails: it needs more than 512 MiB"),
        ("{{ 'x'.ljust(10**11) }}", "FILE fails: it needs more than 512 MiB"),
        ("{{ 'x' * 2**25 }}", "FILE fails: it writes 33,554,432 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "FILE fails: it is nested too deeply"),
    ],
)
def test_templates_that_fail(source, reason):
    tokenizer = Tokenizer(byte_level_tokenizer(), (2,), ChatTemplate(source, {}, "FILE"))
    with pytest.raises(CormError, match=reason) as refused:
        tokenizer.chat("hi")
    assert "\n" not in str(refused.value)


def test_a_template_in_this_process():
    """The same as in the process of its own."""
    variables = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True}
    assert chat_render.render(CHATML, variables) == ChatTemplate(CHATML, {}, "FILE").render("hi")


def test_notes_of_the_command_line(model, run_main, tmp_path):
    from corm_jax.command.cli import main

    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "generation_config.json").write_text("{}")
    (folder / "chat_template.jinja").unlink()
    code, _, err = run_main(main, "corm", "generate", "--model", folder, "--prompt", "It was", "--chat")
    assert f"corm: note: {folder} does not say which token ends a text" in err
    assert (
        code,
        f"corm: {folder} has no chat template: write the conversation into the prompt yourself, without" in err,
    ) == (2, True)
