"""LongBench (Bai et al., arXiv 2308.14508): its prompts, its truncation and its metrics.

Rows, prompt templates and answer lengths come from the benchmark's own files: a directory with ``<task>.jsonl``, and
``dataset2prompt.json`` and ``dataset2maxlen.json`` there or in ``longbench_config`` beside it.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from corm_jax.errors import CormError
from corm_jax.tokenizer import Tokenizer

KINDS = {
    "single-document QA": ("qasper", "multifieldqa_en", "narrativeqa"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique"),
    "summaries": ("gov_report", "multi_news", "qmsum"),
    "few-shot learning": ("trec", "triviaqa", "samsum"),
    "synthetic": ("passage_retrieval_en", "passage_count"),
    "code": ("lcc", "repobench-p"),
}
"""The six kinds of tasks, those in English."""

PLAIN = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
"""Tasks whose prompt is no question: they get no chat template."""

FIRST_LINE = ("trec", "triviaqa", "samsum")
"""Tasks of whose answer only the first line counts."""

FIELDS = ("input", "context", "answers", "all_classes")
CONFIG = ("dataset2prompt.json", "dataset2maxlen.json")


class Question(NamedTuple):
    """A row of LongBench: the prompt's ids, and what a good answer is."""

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

    A class that is part of the right one's name does not count.

    >>> classified("Human or animal", "animal", ["human", "animal", "Human"])
    0.5
    """
    named = [name for name in classes if name in answer]
    named = [name for name in named if not (name in gold and name != gold)]
    return 1 / len(named) if gold in named else 0.0


def paragraph(answer: str, gold: str, classes: list[str]) -> float:
    """The share of the numbers in the answer that are the paragraph's.

    >>> paragraph("Paragraph 3 or 4", "Paragraph 3", [])
    0.5
    """
    wanted = re.findall(r"Paragraph (\d+)", gold)
    numbers = re.findall(r"\d+", answer)
    return sum(number == wanted[0] for number in numbers) / len(numbers) if wanted and numbers else 0.0


def counted(answer: str, gold: str, classes: list[str]) -> float:
    """The share of the numbers in the answer that are the right one."""
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
    """The best over the gold answers, in [0, 1]."""
    if question.task in FIRST_LINE:
        answer = answer.lstrip("\n").split("\n")[0]
    metric = METRICS[question.task]
    return max(metric(answer, gold, question.classes) for gold in question.answers)


def truncated(ids: list[int], limit: int) -> list[int]:
    """At most ``limit`` tokens: the first half and the last half of them.

    >>> truncated(list(range(10)), 4)
    [0, 1, 8, 9]
    """
    half = limit // 2
    return ids if len(ids) <= limit else ids[: limit - half] + ids[len(ids) - half :]


def questions(
    folder: Path,
    tasks: list[str],
    tokenizer: Tokenizer,
    length: int,
    chat: bool,
    limit: int | None,
    blind: bool = False,
) -> Iterator[Question]:
    """The rows of each task, as prompts of at most ``length`` tokens less those of the answer.

    Args:
      blind: leave the context out: what a model guesses from the question alone.

    Raises:
      CormError: for a task or a file that does not exist, or a row that lacks something.
    """
    templates, new_tokens = (_config(folder, name) for name in CONFIG)
    for task in tasks:
        if task not in METRICS:
            raise CormError(f"unknown task {task!r}: choose from {', '.join(METRICS)}")
        if task not in templates or task not in new_tokens:
            raise CormError(f"{' and '.join(CONFIG)} do not both know {task!r}: get them from LongBench's repository")
        for index, row in enumerate(_rows(folder / f"{task}.jsonl", limit)):
            room = length - new_tokens[task]
            words = templates[task].format(**row | ({"context": ""} if blind else {}))
            ids = tokenizer.encode(words)
            if len(ids) > room:  # cut as text, since the template for a conversation goes around what is left
                words = "".join(tokenizer.decode(part) for part in _halves(ids, room))
            ids = tokenizer.chat(words) if chat and task not in PLAIN else tokenizer.encode(words)
            yield Question(f"{task}/{index}", task, ids, row["answers"], row["all_classes"] or [], new_tokens[task])


def _halves(ids: list[int], limit: int) -> tuple[list[int], list[int]]:
    cut = truncated(ids, limit)
    return cut[: limit - limit // 2], cut[limit - limit // 2 :]


def _config(folder: Path, name: str) -> dict[str, Any]:
    for place in (folder / name, folder.parent / "longbench_config" / name, folder / "longbench_config" / name):
        if place.exists():
            return json.loads(place.read_text(encoding="utf-8"))
    raise CormError(f"{folder} has no {name}: get it from LongBench's repository (LongBench/config), and put it there")


def _rows(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    if not path.exists():
        raise CormError(f"there is no {path}: get LongBench's data, or leave {path.stem} out of --task")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and number > limit:
                return
            try:
                row = json.loads(line)
            except ValueError:
                raise CormError(f"{path}, line {number} is not JSON") from None
            if missing := [field for field in FIELDS if field not in row]:
                raise CormError(f"{path}, line {number} has no {missing[0]!r}")
            if not row["answers"]:
                raise CormError(f"{path}, line {number} has no answer to compare with")
            yield row
