"""The evaluation's parts: metrics by hand, result directories cut anywhere, tasks, and how answers are scored."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corm_jax import Corm, CormError, Full, generate, parse
from corm_jax.evaluation import agreement, longbench, recall, summary, texts
from corm_jax.evaluation.asking import answer, answer_nll, ask
from corm_jax.evaluation.intervals import bootstrap
from corm_jax.evaluation.records import CONFIG, LOCK, RESULTS, Records, check_free, read_rows, read_run
from corm_jax.evaluation.report import report
from corm_jax.evaluation.rows import FORMAT, Run
from corm_jax.model.chat import ChatTemplate
from corm_jax.model.checkpoint import Tokenizer
from corm_jax.runs.perplexity import read_text
from tests.models import tiny
from tests.test_checkpoint import TEXT, byte_level_tokenizer

MODEL, POLICY = tiny(), Corm(window=6, recent=3)
TEXT_IDS = np.random.default_rng(0).integers(0, 97, 90).tolist()
RUN = Run(
    format=FORMAT,
    kind="longbench",
    model="m",
    dtype="float32",
    policies=["full", "corm"],
    budget=None,
    chunk=16,
    limit=None,
    seed=0,
    settings={"length": 100},
    begin=[1],
    prompts="0123",
    versions={"jax": "1"},
    device="cpu",
    weights="0123",
    data={"qasper.jsonl": "0123"},
)
ROWS = [
    {"policy": spec, "example": f"é{n}", "task": "qasper", "ran": spec, "score": n / 7, "answer": "“it”\u2028"}
    | {"kept": 1.0, "live_bytes": 2**40, "allocated_bytes": 2**41, "full_bytes": 2**41, "overflow": 0}
    for n in range(3)
    for spec in ("full", "corm")
]


def question(task, answers, classes=()):
    return longbench.Question("0", task, [], list(answers), list(classes), 8)


@pytest.mark.parametrize(
    ("task", "answer", "golds", "classes", "expected"),
    [
        # found: he sold red red house (5 words); wanted: red house (2); shared 2; F1 = 2 * 2 / 7
        ("qasper", "He sold the red, red house.", ["a red house"], [], 4 / 7),
        ("hotpotqa", "Paris", ["London", "Paris, France"], [], 2 / 3),  # the best of the gold answers
        ("hotpotqa", "The", ["the"], [], 0.0),  # articles are no words
        ("triviaqa", "Ada Lovelace\nQuestion: who else", ["ada lovelace"], [], 1.0),  # only the first line
        ("samsum", "\n\nTom is late", ["Tom is very late"], [], 2 * 1 * 0.75 / 1.75),  # precision 1, recall 3/4
        ("gov_report", "a b c d", ["a c e"], [], 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),  # LCS a c
        ("trec", "Type: Date", ["Date"], ["Date", "Place", "Dat"], 1.0),  # part of the right name does not count
        ("trec", "Date or Place", ["Date"], ["Date", "Place"], 0.5),
        ("trec", "Place", ["Date"], ["Date", "Place"], 0.0),
        ("passage_retrieval_en", "Paragraph 12, then 3, 12", ["Paragraph 12"], [], 2 / 3),
        ("passage_count", "There are 7 of 9", ["7"], [], 0.5),
        ("lcc", "```\n// x\nreturn a;\nmore", ["return b;"], [], 0.89),  # 9 characters, one replaced: 1 - 2 / 18
        ("lcc", "# only\n# comments", ["x"], [], 0.0),
    ],
)
def test_metrics(task, answer, golds, classes, expected):
    assert longbench.score(question(task, golds, classes), answer) == pytest.approx(expected)


@given(st.lists(st.integers()), st.integers(1, 20))
def test_truncation_keeps_both_ends(ids, limit):
    if len(ids) > limit:
        first, last = longbench.halves(ids, limit)
        assert (first, last) == (ids[: (limit + 1) // 2], ids[len(ids) - limit // 2 :])
        assert longbench.halves(ids, limit, 1) == (first[:-1], last)


@pytest.fixture(scope="module")
def tokenizer():
    template = "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant{{ '\n' }}"
    return Tokenizer(byte_level_tokenizer(), (2,), ChatTemplate(template, {}, "here"))


def test_texts_of_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("é one\n", "two")))
    assert texts.read_texts([], [str(folder)]) == {str(folder): "é one\ntwo\n"}
    monkeypatch.setattr(texts, "CHARACTERS", 4)
    assert texts.from_hub(f"{folder}::test") == "é on"
    with pytest.raises(CormError, match="cannot load the data set"):
        texts.from_hub(f"{folder}::train")
    (folder / "test.jsonl").write_text('{"words": "one"}\n')
    with pytest.raises(CormError, match="has no column 'text', but words"):
        texts.from_hub(str(folder))


def test_questions(data, tokenizer):
    found = list(longbench.questions(data, ["qasper", "trec"], tokenizer, 100, True, 2))
    assert [one.id for one in found] == ["qasper/0", "qasper/1", "trec/0"]
    asked, classified = (tokenizer.decode(found[n].prompt) for n in (0, 2))
    assert "Read. It was" in asked
    assert asked.removesuffix("\nassistant\n").endswith("Now: who?")
    assert tokenizer.encode("<|im_start|>user")[0] in found[0].prompt  # a question is a user's turn
    assert tokenizer.encode("<|im_start|>user")[0] not in found[2].prompt  # examples to go on from are not
    assert len(found[2].prompt) <= 100
    assert classified.endswith("who?")


@pytest.mark.parametrize(
    ("change", "tasks", "message"),
    [
        (lambda folder: None, ["nothing"], "unknown task 'nothing'"),
        (lambda folder: (folder / "trec.jsonl").unlink(), ["trec"], "there is no .*trec.jsonl"),
        (
            lambda folder: (folder / "trec.jsonl").write_text("{"),
            ["trec"],
            "trec.jsonl, line 1, cannot be used: Invalid JSON",
        ),
        (
            lambda folder: (folder / "trec.jsonl").write_text('{"input": ""}'),
            ["trec"],
            "trec.jsonl, line 1, cannot be used: context: Field required",
        ),
        (lambda folder: (folder / "dataset2maxlen.json").unlink(), ["trec"], "has no dataset2maxlen.json"),
        (
            lambda folder: (folder / "trec.jsonl").write_text(
                '{"input": "", "context": "", "all_classes": null, "answers": []}'
            ),
            ["trec"],
            "trec.jsonl, line 1, cannot be used: there is no answer",
        ),
    ],
)
def test_questions_that_cannot_be(data, tokenizer, change, tasks, message):
    change(data)
    with pytest.raises(CormError, match=message):
        list(longbench.questions(data, tasks, tokenizer, 100, False, None))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.integers(0, 10**4))
def test_records_go_on_from_any_byte(tmp_path_factory, size):
    """Cut anywhere, as by a kill, the file becomes what it would have been."""
    folder = tmp_path_factory.mktemp("records") / "run"

    def run():
        with Records(folder, RUN) as records:
            for row in ROWS:
                if (row["policy"], row["example"]) not in records:
                    records.add(row)
            return records.rows

    assert run() == ROWS
    whole = (folder / RESULTS).read_bytes()
    (folder / RESULTS).write_bytes(whole[: size % (len(whole) + 1)])
    assert run() == ROWS
    assert (folder / RESULTS).read_bytes() == whole


def test_records_of_something_else(tmp_path):
    with Records(tmp_path / "run", RUN) as records:
        records.add(ROWS[0])
    other = dataclasses.replace(RUN, seed=1)
    with (
        pytest.raises(CormError, match=r"another configuration \(seed differs; seed was 0, not 1\): choose another"),
        Records(tmp_path / "run", other),
    ):
        pass
    with pytest.raises(CormError, match="holds something else: choose another --out"), Records(tmp_path, RUN):
        pass
    path = tmp_path / "run" / RESULTS
    line = path.read_bytes()
    path.write_bytes(line + line)
    with pytest.raises(CormError, match="line 2, has 'é0' with 'full' for a second time"):
        read_rows(path.parent, RUN)
    path.write_bytes(b"{\n" + line)
    with pytest.raises(CormError, match="line 1, cannot be used: Invalid JSON"):
        read_rows(path.parent, RUN)


WRONG = [
    "null",
    "true",
    "-1",
    "1.5",
    "NaN",
    "Infinity",
    "1e400",
    "1" + "0" * 30,
    '"x"',
    "[]",
    "{}",
    "[[[1]]]",
    "[true]",
]
RIGHT = {  # by hand: which of them a field may have
    '"x"': "model dtype prompts device weights task example ran answer budget",
    "{}": "versions data settings",
    "[]": "begin policies nll_by_position",
    "null": "budget limit",
    "-1": "chunk seed limit nll kl margin full_nll",
    "1.5": "nll kl margin full_nll",
    "1" + "0" * 30: "chunk seed limit",
}


def damaged(good):
    """A line of JSON for each field and each wrong value of it, one without it, and one with a field too many."""
    for name in good:
        parts = {key: json.dumps(value) for key, value in good.items()}
        for value in (None, *WRONG):
            if name not in RIGHT.get(value, "").split():
                changed = {key: text for key, text in (parts | {name: value}).items() if text is not None}
                yield name, "{" + ", ".join(f'"{key}": {text}' for key, text in changed.items()) + "}"
    yield "extra", json.dumps(good | {"extra": 1})


def test_a_damaged_configuration_is_refused(tmp_path):
    path = tmp_path / CONFIG
    for name, line in damaged(dataclasses.asdict(RUN)):
        path.write_text(line)
        with pytest.raises(CormError, match=f"^the configuration {path} cannot be used: {name}[:.][^\n]* is no result"):
            read_run(tmp_path)
    for content in (
        b"",
        b"[]",
        b"\xff",
        b"{" * 10**5,
        b'{"a": ' * 10**5,
        json.dumps(dataclasses.asdict(RUN))[:-9].encode(),
    ):
        path.write_bytes(content)
        with pytest.raises(CormError, match="^the configuration [^\n]* cannot be used: [^\n]* is no result directory"):
            read_run(tmp_path)
    old = dataclasses.asdict(RUN) | {"format": "corm-jax evaluation 1"}
    path.write_text(json.dumps({key: value for key, value in old.items() if key != "begin"}))
    with (
        pytest.raises(CormError, match="format: Input should be 'corm-jax evaluation 2', not 'corm-jax evaluation 1'"),
        Records(tmp_path, RUN),
    ):
        pass


KINDS = {
    "longbench": {},
    "perplexity": {"score": None, "answer": None, "nll": 1.5, "nll_by_position": [1.5]},
    "agreement": {"score": None, "answer": None, "kl": 0.5, "same": 0.5, "nll": 1.5, "full_nll": 1.5},
    "recall": {"score": None, "task": "pairs", "length": 9, "depth": 0.5, "nll": 1.5, "margin": 0.5, "exact": 1.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_row_is_refused(tmp_path, kind):
    run = dataclasses.replace(RUN, kind=kind)
    first, good = ({**row, **KINDS[kind]} for row in ROWS[:2])
    first, good = ({name: value for name, value in row.items() if value is not None} for row in (first, good))
    with Records(tmp_path / "run", run) as records:
        records.add(first)
    path = tmp_path / "run" / RESULTS
    whole = path.read_bytes()
    for name, line in damaged(good):
        if name == "policy" and '"policy": "x"' in line:
            continue  # below
        path.write_bytes(whole + line.encode() + b"\n")
        with pytest.raises(
            CormError, match=f"^{path}, line 2, cannot be used: {name}[:.][^\n]*: delete that line, and run"
        ):
            read_rows(path.parent, run)
    path.write_bytes(whole + json.dumps(good | {"policy": "x"}).encode() + b"\n")
    with pytest.raises(CormError, match="line 2, has the policy 'x', which is not in the run"):
        read_rows(path.parent, run)
    path.write_bytes(whole + b"\n" + json.dumps(good).encode() + b"\n")
    with pytest.raises(CormError, match="line 2, cannot be used: Invalid JSON"):
        read_rows(path.parent, run)
    if kind == "perplexity":
        path.write_bytes(whole + json.dumps(good | {"nll_by_position": [1.0, np.nan]}).encode() + b"\n")
        with pytest.raises(
            CormError, match="line 2, cannot be used: nll_by_position.1: Input should be a finite number"
        ):
            read_rows(path.parent, run)
    path.write_bytes(whole)
    with Records(tmp_path / "run", run) as records:
        for row in (good | {"kept": np.nan}, good | {"kept": 2.0}, {"policy": "full", "example": "x"}):
            with pytest.raises(CormError, match="^the result of .* cannot be used: .*weights sound in this dtype"):
                records.add(row)
        records.add(good)
    assert read_rows(path.parent, run) == [first, good]


def test_a_report_of_what_can_just_be(tmp_path):
    """The least and the most of every number, and names that are Markdown, markup or mathematics."""
    name = "a|b [/red] $\\frac$ <b> `x`.txt"
    run = dataclasses.replace(
        RUN, kind="perplexity", data={name: "0"}, device="<b>|", policies=["full", "corm:profile=gone"]
    )
    for place, spec in enumerate(run.policies):
        row = {"policy": spec, "example": f"{name}/0", "task": name, "ran": spec, "nll": (-1e9, 1e9)[place]}
        row |= {"nll_by_position": [], "kept": place, "live_bytes": (0, 2**63 - 1)[place], "full_bytes": 1}
        with Records(tmp_path / "run", run) as records:
            records.add(row | {"allocated_bytes": 0, "overflow": 2**63 - 1})
    report([tmp_path / "run"], tmp_path / "page.md")
    table = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_two_processes_do_not_write_to_one_directory(tmp_path):
    folder = tmp_path / "run"
    with Records(folder, RUN):
        pass
    script = (
        "import sys; from pathlib import Path; from corm_jax.evaluation.records import Records, read_run\n"
        f"folder = Path({str(folder)!r})\n"
        "with Records(folder, read_run(folder)): print('in', flush=True); sys.stdin.read()"
    )
    for end in ("close", "kill"):
        other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert other.stdout.read(2) == b"in"
        with pytest.raises(CormError, match=f"^another process writes to {folder}: wait .* or choose another --out$"):
            check_free(folder)
        with pytest.raises(CormError, match="another process writes"), Records(folder, RUN):
            pass
        assert not (folder / RESULTS).read_bytes()
        if end == "close":
            other.communicate()
            assert sorted(path.name for path in folder.iterdir()) == [CONFIG, RESULTS]
        else:
            other.kill()
            other.communicate()
            assert (folder / LOCK).exists()
        with Records(folder, RUN):
            pass
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, RESULTS]


def test_a_full_disk(tmp_path):
    """Simulated by a limit on the size of files: earlier results stay, and the run can be continued."""
    resource = pytest.importorskip("resource")
    with Records(tmp_path / "run", RUN) as records:
        records.add(ROWS[0])
        size, (soft, hard) = (tmp_path / "run" / RESULTS).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
        for _ in range(2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
            try:
                with pytest.raises(CormError, match=r"^cannot write .*: 1 results are there; make room, and run"):
                    records.add(ROWS[1])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        records.add(ROWS[1])
    assert read_rows(tmp_path / "run", RUN) == ROWS[:2]


def test_a_directory_that_a_kill_left_half_made(tmp_path):
    for name in (LOCK, f".{CONFIG}.123.part"):
        (tmp_path / name).write_text("{")
    with Records(tmp_path, RUN) as records:
        records.add(ROWS[0])
    assert read_rows(tmp_path, read_run(tmp_path)) == ROWS[:1]
    (tmp_path / "file").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, "file", RESULTS]
    for place in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(CormError, match=f"^cannot use {place}: .*: choose another --out$"), Records(place, RUN):
            pass


@pytest.mark.parametrize("name", recall.TASKS)
def test_tasks_hide_what_they_ask_for(tokenizer, name):
    hay = recall.Haystack(tokenizer, TEXT * 60)
    found = list(recall.tasks(hay, [name], [1500], [0.0, 0.5, 1.0], 2, seed=3))
    assert [one.id for one in found] == [one.id for one in recall.tasks(hay, [name], [1500], [0.0, 0.5, 1.0], 2, 3)]
    assert len({one.id for one in found}) == len(found)
    for task in found:
        assert task.gold not in task.others
        assert 500 < len(task.prompt) + len(task.gold) <= 1500 + 150  # about as long
        prompt, gold = tokenizer.decode(task.prompt), tokenizer.decode(task.gold).strip()
        assert gold in prompt
        for other in task.others:
            assert tokenizer.decode(other).strip() in prompt
        if name in ("passkey", "needle"):
            assert prompt.find(gold) / len(prompt) == pytest.approx(task.depth, abs=0.15)
    for task, blind in zip(found, recall.tasks(hay, [name], [1500], [0.0, 0.5, 1.0], 2, 3, blind=True), strict=True):
        assert (blind.id, blind.gold) == (task.id, task.gold)
        assert tokenizer.decode(task.prompt).endswith(tokenizer.decode(blind.prompt))
        assert tokenizer.decode(task.gold).strip() not in tokenizer.decode(blind.prompt)


def test_tasks_that_cannot_be(tokenizer):
    hay = recall.Haystack(tokenizer, TEXT)
    for arguments, message in (
        ((["nothing"], [512], [0.5]), "unknown task 'nothing'"),
        ((["needle"], [10], [0.5]), "a prompt of 10 tokens is too short"),
        ((["needle"], [512], [1.5]), "depth must be in"),
        ((["repeat"], [10**6], [0.5]), "give more text"),
    ):
        with pytest.raises(CormError, match=message):
            list(recall.tasks(hay, *arguments, 1, 0))


@pytest.mark.parametrize("chunk", [1, 4])
def test_an_answer_is_scored_as_a_text_is(chunk):
    """Prompt and answer apart, or one text read by `perplexity.read_text`: the same NLL."""
    prompt, gold = TEXT_IDS[:40], TEXT_IDS[40:]
    asked = ask(MODEL, POLICY, prompt, 96, chunk)
    expected = read_text(MODEL, POLICY, TEXT_IDS, chunk=chunk, prompt=40).nll[39:].mean()
    for _ in range(2):  # the caches are not used up
        assert answer_nll(MODEL, POLICY, asked, gold, chunk) == pytest.approx(float(expected), abs=1e-5)


def test_an_answer_is_what_generate_writes():
    asked = ask(MODEL, POLICY, TEXT_IDS, 130, 1)
    expected = generate(MODEL, POLICY, [TEXT_IDS], max_new_tokens=20, capacity=130)
    assert answer(MODEL, POLICY, asked, 20, ())[0] == expected.tokens[0]
    end = expected.tokens[0][5]
    assert answer(MODEL, POLICY, asked, 20, (end,))[0] == expected.tokens[0][: expected.tokens[0].index(end)]


def test_agreement():
    itself = agreement.measure(MODEL, Full(), TEXT_IDS, 30, 4)
    np.testing.assert_allclose(itself.kl, 0, atol=1e-6)
    assert itself.same.all()
    assert len(itself.kl) == 60
    found = agreement.measure(MODEL, POLICY, TEXT_IDS, 30, 4)
    np.testing.assert_allclose(found.nll, read_text(MODEL, POLICY, TEXT_IDS, chunk=4, prompt=30).nll[29:], atol=1e-5)
    np.testing.assert_allclose(found.full_nll, itself.nll, atol=1e-5)
    assert (found.kl > -1e-6).all()
    assert found.kl.mean() > 1e-3
    everything, text = agreement.measure(MODEL, POLICY, TEXT_IDS, None, 4), read_text(MODEL, POLICY, TEXT_IDS, chunk=4)
    np.testing.assert_allclose(everything.nll, text.nll, atol=1e-5)
    np.testing.assert_array_equal(everything.live, text.live)
    with pytest.raises(CormError, match="waits for the end of the prompt"):
        agreement.measure(MODEL, parse("snapkv"), TEXT_IDS, None, 4)


def test_the_full_cache_is_read_once_for_several_policies():
    """Over several blocks, whose caches are given up to the next."""
    ids = TEXT_IDS * 4
    kept = [np.asarray(block.log_probability) for block in agreement.blocks(MODEL, Full(), ids, 50, 4)]
    assert len(kept) > 2
    together, alone = (agreement.measure(MODEL, POLICY, ids, 50, 4, full=full) for full in (kept, None))
    np.testing.assert_allclose(together.kl, alone.kl, atol=1e-6)
    np.testing.assert_allclose(together.full_nll, read_text(MODEL, Full(), ids, chunk=4).nll[49:], atol=1e-5)


def test_intervals():
    few = bootstrap([1.0])
    assert (few.mean, few.low, few.high) == (1.0, -np.inf, np.inf)
    values = np.random.default_rng(0).normal(size=400)
    found = bootstrap(values)
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20  # the interval of a normal mean
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_texts_are_one_sample_and_tasks_are_strata():
    rows = [
        {"policy": policy, "example": f"{task}/{n}", "task": task, measure: value * (1 + n) + (policy == "corm")}
        | dict.fromkeys(("kept", "live_bytes", "allocated_bytes", "full_bytes"), 1)
        for measure, task, value in (("nll", "a", 1.0), ("nll", "b", 10.0))
        for n in range(2)
        for policy in ("full", "corm")
    ]
    found = {(line.task, line.policy): line for line in summary.lines("perplexity", rows)}
    assert found["all texts", "full"].measures["nll"].mean == np.mean([1, 2, 10, 20])
    assert found["all texts", "corm"].against == (1, 1, 1)
    assert found["all texts", "full"].measures["nll"].low < 3 < 15 < found["all texts", "full"].measures["nll"].high
    found = {(line.task, line.policy): line for line in summary.lines("longbench", rows, against="corm")}
    assert found["all tasks", "full"].measures["nll"] == bootstrap([1.0, 2.0], [10.0, 20.0])
    assert found["all tasks", "full"].against == (-1, -1, -1)
