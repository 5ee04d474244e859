"""LongBench (Bai et al., arXiv 2308.14508): its prompts, its truncation and its metrics.

Rows, prompt templates and answer lengths come from the benchmark's own files: a directory with ``<task>.jsonl``, and
``dataset2prompt.json`` and ``dataset2maxlen.json`` there or in ``longbench_config`` beside it.
"""

import os
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from corm_jax.errors import CormError
from corm_jax.files import STRICT, parse_json, read_json
from corm_jax.model.prompts import Text
from corm_jax.model.tokenizer import Tokenizer

KINDS = {
    "single-document QA": ("qasper", "multifieldqa_en", "narrativeqa"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique"),
    "summaries": ("gov_report", "multi_news", "qmsum"),
    "few-shot learning": ("trec", "triviaqa", "samsum"),
    "synthetic": ("passage_retrieval_en", "passage_count"),
    "code": ("lcc", "repobench-p"),
}
"""The six kinds of tasks, each with its tasks in English."""

PLAIN = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
"""Tasks whose prompt is not a question, to which no chat template is applied."""

FIRST_LINE = ("trec", "triviaqa", "samsum")
"""Tasks in which only the first line of an answer counts."""

CONFIG = ("dataset2prompt.json", "dataset2maxlen.json")

GET = "get it from LongBench's repository (LongBench/config), and put it there"


@dataclass(frozen=True)
class Row:
    """A line of a task's file. Its other fields are ignored.

    Attributes:
      answers: the right answers, of which any one is enough.
      all_classes: the possible answers of a classification task.
    """

    __pydantic_config__: ClassVar = STRICT | {"extra": "ignore"}

    input: str
    context: str
    answers: list[str]
    all_classes: list[str] | None

    def __post_init__(self):
        if not self.answers:
            raise CormError("there is no answer to compare with")


class Question(NamedTuple):
    """A row of LongBench: the ids of the prompt, and the data by which an answer is scored."""

    id: str
    task: str
    prompt: list[int]
    answers: list[str]
    classes: list[str]
    new_tokens: int


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and surplus white space.

    >>> normalized("The  cat, sat!")
    'cat sat'
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer: str, gold: str, classes: list[str]) -> float:
    """F1 of the words that two texts share, counted as often as they occur in both.

    >>> token_f1("the cat sat down", "a cat sat", [])
    0.8
    """
    found, wanted = normalized(answer).split(), normalized(gold).split()
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def rouge_l(answer: str, gold: str, classes: list[str]) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), by rouge-score without stemming.

    >>> round(rouge_l("police killed the gunman", "police kill the gunman", []), 3)
    0.75
    """
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"]).score(gold, answer)["rougeL"].fmeasure


def classified(answer: str, gold: str, classes: list[str]) -> float:
    """1 over the number of classes that the answer names, if the right one is among them.

    A class whose name is part of the name of the right one does not count.

    >>> classified("Human or animal", "animal", ["human", "animal", "Human"])
    0.5
    """
    named = [name for name in classes if name in answer]
    named = [name for name in named if not (name in gold and name != gold)]
    return 1 / len(named) if gold in named else 0.0


def paragraph(answer: str, gold: str, classes: list[str]) -> float:
    """The share of the numbers in the answer that are the number of the right paragraph.

    >>> paragraph("Paragraph 3 or 4", "Paragraph 3", [])
    0.5
    """
    wanted = re.findall(r"Paragraph (\d+)", gold)
    numbers = re.findall(r"\d+", answer)
    return sum(number == wanted[0] for number in numbers) / len(numbers) if wanted and numbers else 0.0


def counted(answer: str, gold: str, classes: list[str]) -> float:
    """The share of the numbers in the answer that are the right number."""
    numbers = re.findall(r"\d+", answer)
    return sum(number == str(gold) for number in numbers) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, gold: str, classes: list[str]) -> float:
    r"""1 - edit distance over length of the first line that is code, by rapidfuzz, rounded to hundredths.

    >>> code_similarity("# add\nreturn a+b", "return a + b", [])
    0.91
    """
    from rapidfuzz import fuzz

    lines = (
        line for line in answer.lstrip("\n").split("\n") if not any(mark in line for mark in "`#") and "//" not in line
    )
    return round(fuzz.ratio(next(lines, ""), gold)) / 100


METRICS: dict[str, Callable[[str, str, list[str]], float]] = (
    dict.fromkeys(("qasper", "multifieldqa_en", "narrativeqa", "hotpotqa", "2wikimqa", "musique", "triviaqa"), token_f1)
    | dict.fromkeys(("gov_report", "multi_news", "qmsum", "samsum"), rouge_l)
    | dict.fromkeys(("lcc", "repobench-p"), code_similarity)
    | {"trec": classified, "passage_retrieval_en": paragraph, "passage_count": counted}
)


def score(question: Question, answer: str) -> float:
    """The best score over the gold answers, in [0, 1]."""
    if question.task in FIRST_LINE:
        answer = answer.lstrip("\n").split("\n")[0]
    metric = METRICS[question.task]
    return max(metric(answer, gold, question.classes) for gold in question.answers)


def halves(ids: list[int], limit: int, first: int = 0) -> tuple[list[int], list[int]]:
    """The first and last half of ``limit`` tokens, cut out of more; ``first`` other tokens count as part of the first.

    >>> halves(list(range(10)), 4)
    ([0, 1], [8, 9])
    >>> halves(list(range(10)), 4, first=1)
    ([0], [8, 9])
    """
    head = max(limit - limit // 2 - first, 0)
    return ids[:head], ids[len(ids) - (limit - first - head) :]


def questions(
    folder: Path,
    tasks: list[str],
    tokenizer: Tokenizer,
    length: int,
    chat: bool,
    limit: int | None,
    blind: bool = False,
) -> Iterator[Question]:
    """The rows of each task, as prompts of at most ``length`` tokens minus those of the answer.

    A longer prompt is cut as text, as LongBench does it, and encoded again: the words at the cut may then take a token
    more or less. A chat template is added after the cut.

    Args:
      blind: leave the context out, which measures what a model guesses from the question alone.

    Raises:
      CormError: for a task or a file that does not exist, a file or a row that is not as LongBench has it, or a length
        that leaves no tokens beside the answer.
    """
    templates, most = (read_json(path, dict, "configuration", GET) for path in _config_files(folder))
    for task in tasks:
        if task not in METRICS:
            raise CormError(f"unknown task {task!r}: choose from {', '.join(METRICS)}")
        if task not in templates or task not in most:
            raise CormError(f"{' and '.join(CONFIG)} do not both have {task!r}: get them from LongBench's repository")
        template, new_tokens = templates[task], most[task]
        if not isinstance(new_tokens, int) or isinstance(new_tokens, bool) or new_tokens < 1:
            raise CormError(f"{CONFIG[1]}: {task} must be a number of tokens from 1 up, not {new_tokens!r}: {GET}")
        filled(template, task, dict.fromkeys(("input", "context"), ""))
        room = length - new_tokens
        if room < len(tokenizer.begin) + 2:
            raise CormError(
                f"prompts of {length:,} tokens leave nothing beside the {new_tokens:,} of an answer of {task}: ask for "
                "longer prompts"
            )
        for index, row in enumerate(_rows(folder / f"{task}.jsonl", limit)):
            words = filled(template, task, {"input": row.input, "context": "" if blind else row.context})
            text = Text(tokenizer, words, f"the prompt of {task}/{index}")
            if len(text) > room:  # cut as text, since a chat template is added after the cut
                words = "".join(tokenizer.decode(part) for part in halves(text.ids, room, len(text.begin)))
            chats = chat and task not in PLAIN
            ids = tokenizer.chat(words) if chats else Text(tokenizer, words, text.name).whole
            yield Question(f"{task}/{index}", task, ids, row.answers, row.all_classes or [], new_tokens)


def filled(template: Any, task: str, values: Mapping[str, str]) -> str:
    """A template with its placeholders replaced. They can only be names, so that no attribute of an object is read.

    >>> filled("{context} Q: {input} {{sic}}", "qasper", {"context": "A.", "input": "who?"})
    'A. Q: who? {sic}'

    Raises:
      CormError: for a template that is not text, or has other placeholders.
    """
    found = []
    try:
        for words, name, form, conversion in string.Formatter().parse(template):
            if name is not None and (name not in values or form or conversion):
                given = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
                raise CormError(f"it may hold {' and '.join(map('{{{}}}'.format, values))}, not {{{given}}}")
            found += [words, "" if name is None else values[name]]
    except (TypeError, ValueError) as error:
        reason = "it is no text" if isinstance(error, TypeError) else error
        raise CormError(f"{CONFIG[0]}: the template of {task} cannot be used: {reason}: {GET}") from None
    return "".join(found)


def there(folder: Path) -> list[str]:
    """The tasks for which a directory has rows.

    Raises:
      CormError: if there are none.
    """
    names = [task for task in METRICS if _there(folder / f"{task}.jsonl")]
    if not names:
        raise CormError(f"there is no task of LongBench in {folder}: it should hold files such as qasper.jsonl")
    return names


def contents(folder: Path, tasks: Sequence[str]) -> dict[str, bytes]:
    """The contents of all files from which the questions of some tasks are made, by the names of the files.

    Raises:
      CormError: for an unknown task, or a missing file.
    """
    for task in tasks:
        if task not in METRICS:
            raise CormError(f"unknown task {task!r}: choose from {', '.join(METRICS)}")
    files = [*_config_files(folder), *(folder / f"{task}.jsonl" for task in tasks)]
    return {file.name: _content(file) for file in files}


def _config_files(folder: Path) -> list[Path]:
    """The files with the templates and the lengths of the answers."""
    found = []
    for name in CONFIG:
        places = folder / name, folder.parent / "longbench_config" / name, folder / "longbench_config" / name
        place = next((place for place in places if _there(place)), None)
        if place is None:
            raise CormError(f"{folder} has no {name}: {GET}")
        found.append(place)
    return found


def _there(path: Path) -> bool:
    """Whether a file exists. Unlike `Path.exists`, this is also defined for names that are too long."""
    return os.access(path, os.F_OK)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CormError(f"there is no {path}: get LongBench's data, or leave {path.stem} out of --task") from None
    except OSError as error:
        raise CormError(f"cannot read {path}: {error.strerror}") from None


def _rows(path: Path, limit: int | None) -> Iterator[Row]:
    """The rows of a task. Empty lines are skipped."""
    lines = [(number, line) for number, line in enumerate(_content(path).split(b"\n"), 1) if line.strip()]
    for number, line in lines[:limit]:
        yield parse_json(line, Row, f"{path}, line {number},", "get it from LongBench's data, or mend the line")
