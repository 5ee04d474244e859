"""Every prompt begins as the model's tokenizer begins a text, and holds the text that was given, however it is read."""

import codecs
import re

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from corm_jax import CormError
from corm_jax.command import cli
from corm_jax.evaluation import longbench, recall, texts
from corm_jax.evaluation.suite import Suite
from corm_jax.model import gguf_tokenizer
from corm_jax.model.generation import Blocks
from corm_jax.model.prompts import Text, inside, scored_from
from corm_jax.model.tokenizer import Tokenizer
from corm_jax.runs import calibrate
from tests.test_checkpoint import TEXT, byte_level_tokenizer

WORDS = "It was the best of times, it was the worst of times; 12345 was the time of man.\nThe best man is it.\n" * 60
SPECIAL = [("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)]
AROUND = {
    "nothing": None,
    "begin": "<|im_start|> $A",
    "two ids": "<|endoftext|> <|im_start|> $A",
    "end": "$A <|im_end|>",
    "both": "<|im_start|> $A <|im_end|>",
}


def byte_level(around):
    inner = byte_level_tokenizer()
    if AROUND[around]:
        inner.post_processor = processors.TemplateProcessing(single=AROUND[around], special_tokens=SPECIAL)
    return Tokenizer(inner, (2,))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """SentencePiece as Llama 2 has it, and the tokenizer that is made of it."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text(TEXT + "\n" + WORDS)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "spm"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    ids = range(trained.get_piece_size())
    kinds = [
        2 if trained.is_unknown(i) else 3 if trained.is_control(i) else 6 if trained.is_byte(i) else 1 for i in ids
    ]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [trained.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [trained.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return trained, gguf_tokenizer.from_gguf(fields, folder)


@pytest.fixture(scope="module")
def tokenizers(pieces):
    return {name: byte_level(name) for name in AROUND} | {"Llama 2": pieces[1]}


def check(tokenizer, prompt):
    """A prompt begins as a text does, once, and does not end as one."""
    first = len(tokenizer.begin)
    assert prompt[:first] == tokenizer.begin
    assert not {0, 1, 2} & set(prompt[first:])  # nothing that the tokenizer puts around a text
    assert len(prompt) > first
    return prompt[first:]


names = st.sampled_from([*AROUND, "Llama 2"])
fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@fixtures
@given(name=names, words=st.text(min_size=1, max_size=40), tokens=st.integers(-1, 40), start=st.integers(0, 30))
def test_a_part_of_a_text(tokenizers, name, words, tokens, start):
    tokenizer = tokenizers[name]
    ids, first = tokenizer.encode(words, special=False), len(tokenizer.begin)
    text = Text(tokenizer, words, "it")
    assert (text.whole, len(text)) == ([*tokenizer.begin, *ids], first + len(ids))
    assert text.whole == tokenizer.encode(words)[: first + len(ids)]
    if first < tokens <= first + len(ids) - start:
        assert check(tokenizer, text.part(tokens, start)) == ids[start : start + tokens - first]
        assert len(text.part(tokens, start)) == tokens
    else:
        with pytest.raises(CormError, match="ask for at least" if tokens <= first else "it has .* tokens"):
            text.part(tokens, start)


@fixtures
@given(name=names, words=st.text(min_size=1, max_size=200), tokens=st.integers(2, 20), limit=st.integers(1, 50))
def test_stretches_are_the_text(tokenizers, name, words, tokens, limit):
    tokenizer = tokenizers[name]
    ids, own = tokenizer.encode(words, special=False), tokens - len(tokenizer.begin)
    if own < 1 or len(ids) < own:
        with pytest.raises(CormError, match="ask for at least|has .* tokens"):
            texts.stretches(tokenizer, {"a": words}, tokens, limit)
        return
    found = texts.stretches(tokenizer, {"a": words, "b": words}, tokens, limit)
    assert {len(one.prompt) for one in found} == {tokens}
    for task in "ab":
        mine = [one for one in found if one.task == task]
        assert len(mine) == min(len(ids) // own, limit)
        assert [one.id for one in mine] == [f"{task}/{n * own}" for n in range(len(mine))]
        assert [x for one in mine for x in check(tokenizer, one.prompt)] == ids[: own * len(mine)]


@fixtures
@given(
    name=names,
    task=st.sampled_from(list(recall.TASKS)),
    length=st.integers(600, 900),
    depth=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
def test_tasks_hide_things_in_the_text(tokenizers, name, task, length, depth, seed):
    tokenizer = tokenizers[name]
    hay, first = recall.Haystack(tokenizer, WORDS), len(tokenizer.begin)
    (one,), (blind,) = (list(recall.tasks(hay, [task], [length], [depth], 1, seed, blind)) for blind in (False, True))
    ids, bare = check(tokenizer, one.prompt), check(tokenizer, blind.prompt)
    assert ids[-len(bare) :] == bare
    # What the model reads and is to write, as one text: no space too many where pieces meet.
    read, question = tokenizer.decode(one.prompt + one.gold), tokenizer.decode(bare)
    if task == "repeat":
        assert len(one.prompt) + len(one.gold) == length
        assert tokenizer.decode(ids[:-1]) in WORDS
        assert (bare, one.gold) == (ids[:1], ids[1 : len(one.gold) + 1])
    elif task == "passkey":
        key = read.rpartition(" ")[2]
        assert length - len(hay.inside(recall.DULL)) < len(one.prompt) <= length
        assert read.replace(recall.DULL, "") == (
            "There is important information hidden inside irrelevant text. Find and memorize it.\n"
            f"The pass key is {key}. Remember it. {key} is the pass key.\nWhat is the pass key? The pass key is {key}"
        )
    elif task == "pairs":
        pair = r'"[0-9a-f-]{36}": "[0-9a-f-]{36}"\n'
        assert re.fullmatch(f"Extract the value of the key from the data below.\n\n({pair})+\n{pair[:-3]}", read)
        assert read.count(read.rpartition("\n")[2]) == 2
        assert len(one.prompt) < length
    else:
        city, number = re.search(r"(\w+) is (\d+)$", read).groups()
        fact = r"\nThe special number of \w+ is \d+\.\n"
        assert f"\nThe special number of {city} is {number}.\n" in read
        assert len(re.findall(fact, read)) == len(one.others) + 1
        text = re.sub(fact, "", read)
        assert text.endswith(f"\nWhat is the special number of {city}? The special number of {city} is {number}")
        assert text.rpartition("\nWhat is")[0] in WORDS
        assert question.strip().startswith(f"What is the special number of {city}?")
        assert len(one.prompt) == length
    assert first + len(ids) == len(one.prompt)


@fixtures
@given(name=names, words=st.text(max_size=20))
def test_words_inside_a_text(tokenizers, pieces, name, words):
    """Behind a character, as the tokenizer has them in one text."""
    tokenizer = tokenizers[name]
    ids = inside(tokenizer, words)
    if name == "Llama 2":
        assert [*pieces[0].encode("\n"), *ids] == pieces[0].encode("\n" + words)
    else:
        assert ids == tokenizer.encode(words, special=False)


@fixtures
@given(name=names, length=st.integers(20, 300), blind=st.booleans())
def test_questions(tokenizers, data, name, length, blind):
    tokenizer = tokenizers[name]
    for one in longbench.questions(data, ["qasper", "trec"], tokenizer, length, False, 1, blind):
        first, room = len(tokenizer.begin), length - one.new_tokens
        whole = "Read.  Now: who?" if one.task == "qasper" else "\nwho?"
        if not blind:
            whole = whole.replace("Read. ", f"Read. {TEXT * 4}", 1) if one.task == "qasper" else TEXT * 4 + whole
        ids = tokenizer.encode(whole, special=False)
        check(tokenizer, one.prompt)
        if first + len(ids) <= room:
            assert one.prompt == [*tokenizer.begin, *ids]
        else:
            head, tail = longbench.halves(ids, room, first)
            assert first + len(head) + len(tail) == room
            assert one.prompt == [
                *tokenizer.begin,
                *tokenizer.encode(tokenizer.decode(head) + tokenizer.decode(tail), False),
            ]


class Stop(BaseException):
    """The tokens that a command gives to the model, raised instead of running it."""


@pytest.fixture
def prompts(run_main, monkeypatch):
    """The prompts that a command would read."""

    def stop(what):
        raise Stop(what)

    monkeypatch.setattr(Suite, "run", lambda self, records, examples, *_: stop([one.prompt for one in examples]))
    monkeypatch.setattr(Blocks, "cut", classmethod(lambda cls, prompts, *_, **__: stop([list(one) for one in prompts])))
    monkeypatch.setattr(calibrate, "_costs", lambda model, ids, seed, second, progress: stop([ids, second]))

    def run(command, *arguments):
        with pytest.raises(Stop) as stopped:
            run_main(cli.main, "corm", *command.split(), *arguments)
        return stopped.value.args[0]

    return run


COMMANDS = {
    "compare": "compare --tokens 300 --policy full --text",
    "generate": "generate --policy full --prompt-file",
    "record": "record --tokens 300 --out {out} --text",
    "calibrate": "calibrate --tokens 300 --target-live 0.5 --out {out} --text",
    "analyse": "analyse --tokens 300 --out {out}.json --text",
    "perplexity": "eval perplexity --tokens 300 --policy full --out {out} --text",
    "agreement": "eval agreement --tokens 300 --policy full --out {out} --text",
    "recall": "eval recall --task needle --length 300 --limit 1 --policy full --out {out} --text",
    "blind": "eval recall --task needle --task repeat --length 300 --limit 1 --blind --policy full --out {out} --text",
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_read_a_file_alike(prompts, checkpoints, tmp_path, around, command):
    """Its bytes as UTF-8, no byte order mark, the newlines that it has, and what the tokenizer puts first."""
    content = TEXT.replace("\n", "\r\n") * 9 + "\r\N{NEXT LINE}\N{LINE SEPARATOR}\v\f end \N{ZERO WIDTH NO-BREAK SPACE}"
    (tmp_path / "text.txt").write_bytes(codecs.BOM_UTF8 + content.encode())
    words = COMMANDS[command].format(out=tmp_path / "out")
    found = prompts(words, tmp_path / "text.txt", "--model", checkpoints[around])
    tokenizer = byte_level(around)
    ids, first = tokenizer.encode(content, special=False), len(tokenizer.begin)
    if command in ("recall", "blind"):
        assert all((len(one) == 300) == (command == "recall") for one in found)
        assert {tuple(one[:first]) for one in found} == {tuple(tokenizer.begin)}
    elif command == "generate":
        assert found == [[*tokenizer.begin, *ids]]
    elif command == "calibrate":
        assert found == [[*tokenizer.begin, *ids[: 300 - first]], ids[:75]]
    else:
        assert found[0] == [*tokenizer.begin, *ids[: 300 - first]]
        assert [x for one in found for x in one[first:]] == ids[: (300 - first) * len(found)]
    for one in found if command != "calibrate" else found[:1]:
        check(tokenizer, one)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_text(run_main, model, tmp_path, command):
    path, words = tmp_path / "text", COMMANDS[command].format(out=tmp_path / "out").split()

    def refused(path):
        code, _, err = run_main(cli.main, "corm", *words, path, "--model", model)
        assert (code, err.count("\n"), "Traceback" in err) == (2, 1, False), err
        return err

    for content, message in (
        (None, "cannot read"),
        (b"", "is empty"),
        (codecs.BOM_UTF8, "is empty"),
        (b"abc\xff", "is not UTF-8 text: invalid start byte at byte 3"),
        (codecs.BOM_UTF8 + b"abc\xc3", "is not UTF-8 text: unexpected end of data at byte 6"),
        ("It was".encode("utf-16"), "is not UTF-8 text"),
        ("It was".encode("utf-16-le"), "is not UTF-8 text: it has a NUL at byte 1"),
        (b"abc \xed\xa0\x80", "is not UTF-8 text"),  # half a character
    ):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        assert message in refused(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    several = words[0] in ("eval", "analyse", "calibrate")
    assert ("there is no .txt file" if several else "Is a directory") in refused(folder)
    assert "File name too long" in refused("x" * 300)


def test_what_the_tokenizer_puts_first_is_not_scored():
    for around, prompt, first in (("nothing", None, 1), ("begin", None, 1), ("two ids", None, 2), ("two ids", 1, 2)):
        assert scored_from(byte_level(around), prompt) == first
    assert scored_from(byte_level("two ids"), 7) == 7


def test_a_text_that_begins_itself():
    """As a template for conversations writes it: once is enough."""
    tokenizer = byte_level("two ids")
    text = Text(tokenizer, "<|endoftext|><|im_start|>It was", "it")
    assert text.whole == [0, 1, *tokenizer.encode("It was", special=False)]
    with pytest.raises(CormError, match="it has no tokens"):
        _ = Text(tokenizer, "<|endoftext|><|im_start|>", "it").whole
