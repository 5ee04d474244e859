"""The command line of the evaluation: ``corm eval``, ``corm report`` and ``corm analyse``."""

import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from rich.table import Table

from corm_jax import console, inputs, plots
from corm_jax.cache import prompt_of, slots_for
from corm_jax.errors import CormError
from corm_jax.evaluation import agreement as agreements
from corm_jax.evaluation import analysis
from corm_jax.evaluation import longbench as benchmark
from corm_jax.evaluation import recall as recalls
from corm_jax.evaluation.asking import answer, answer_nll, ask
from corm_jax.evaluation.records import Records
from corm_jax.evaluation.report import report as write_report
from corm_jax.evaluation.suite import Suite, contents, memory, surroundings
from corm_jax.evaluation.summary import MEASURES, lines
from corm_jax.files import check_writable, write_json
from corm_jax.perplexity import read
from corm_jax.policies import keys_of, parse

POLICIES = ("full", "corm", "streaming_llm", "h2o:score=mean", "tova", "snapkv", "random")


@click.group("eval")
def evaluate():
    """Score policies on tasks, example by example, into a directory that survives being killed."""


_options = console.options(
    console.model_options,
    click.option("--policy", "specs", multiple=True, metavar="SPEC", help="name:key=value,...; repeat to compare"),
    click.option("--budget", metavar="KEYS", help="hold all but full to so many keys a head, or a share of the prompt"),
    click.option("--chunk", type=int, default=16, show_default=True, help="tokens between evictions; 1 is exact"),
    click.option("--limit", type=int, help="so many examples of each task at most"),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--out", type=click.Path(path_type=Path), required=True, help="the directory of the results"),
)
_texts = click.option(
    "--text",
    "paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="a UTF-8 file, or a directory of .txt files; repeat for more  [default: Python's language reference]",
)


class Document(NamedTuple):
    """A stretch of a text; ``prompt`` is all of it."""

    id: str
    task: str
    prompt: list[int]


def _documents(tokenizer, texts: dict[str, bytes], tokens: int, limit: int | None) -> list[Document]:
    if tokens < 2:
        raise CormError(f"--tokens must be at least 2, not {tokens}: the first predicts, the second is predicted")
    found = []
    for name, content in texts.items():
        ids = tokenizer.encode(content.decode("utf-8"))
        starts = range(0, len(ids) - tokens + 1, tokens)
        if not starts:
            raise CormError(f"the text {name!r} has {len(ids):,} tokens, --tokens asks for {tokens:,}")
        found += [Document(f"{name}/{start}", name, ids[start : start + tokens]) for start in list(starts)[:limit]]
    return found


def _files(paths: Sequence[Path]) -> dict[str, bytes]:
    files = [file for path in paths for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    if paths and not files:
        raise CormError(f"there is no .txt file in {paths[0]}")
    for file in files:
        inputs.read_text(file)
    return contents(files) or {"pydoc_data.topics": inputs.reference_text().encode()}


def _go(kind, common, settings: dict[str, Any], data, make_examples, make_score) -> None:
    """What all kinds have in common: checks, records, the run with its bar, the table."""
    model_name, dtype, specs, budget, chunk, limit, seed, out = common
    specs = list(dict.fromkeys(specs or POLICIES))
    for spec in specs:
        parse(spec)
    if budget:
        keys_of(budget, 1)
    if chunk < 1 or (limit is not None and limit < 1):
        raise CormError(f"--chunk and --limit must be at least 1, not {chunk} and {limit}")
    model, tokenizer = inputs.load(model_name, dtype)
    examples = make_examples(model, tokenizer)
    config = {"format": "corm-jax evaluation 1", "kind": kind, "model": model_name, "dtype": dtype, "policies": specs}
    config |= {"budget": budget, "chunk": chunk, "limit": limit, "seed": seed} | settings | surroundings(model, data)
    longest = max(len(example.prompt) for example in examples)
    inputs.note_context(model, longest)
    suite = Suite(model, specs, budget, chunk)
    with Records(out, config) as records, console.progress_bar() as progress:
        if records.rows:
            print(f"corm: note: {len(records.rows):,} results are there already", file=sys.stderr)
        task = progress.add_task(kind, total=len(examples) * len(specs))
        suite.run(
            records, examples, make_score(model, tokenizer, longest), lambda n: progress.update(task, completed=n)
        )
    _table(kind, records.rows)


def _table(kind: str, rows: list[dict[str, Any]]) -> None:
    found = list(lines(rows))
    measures = [measure for measure in MEASURES if any(measure in line.measures for line in found)]
    table = Table(title=f"{kind}: means over examples [95%]", title_justify="left")
    for column in ("task", "policy", "examples", "kept", *measures, f"{measures[0]} - full"):
        table.add_column(column)
    for line in found:
        cells = [str(line.measures.get(measure, "")) for measure in measures]
        table.add_row(
            line.task, line.policy, str(line.examples), f"{line.kept:.3f}", *cells, str(line.against_full or "")
        )
    console.output().print(table)


@evaluate.command()
@_options
@_texts
@click.option("--tokens", type=int, default=2048, show_default=True, help="of each stretch of a text")
@click.option("--prompt", type=int, help="how many of them are the prompt; not scored")
@click.option("--bucket", type=int, default=512, show_default=True, help="positions that are averaged together")
def perplexity(model, dtype, specs, budget, chunk, limit, seed, out, paths, tokens, prompt, bucket):
    """How well texts are predicted: NLL, and by position."""
    data = _files(paths)
    for spec in specs or POLICIES:
        prompt_of(parse(spec), prompt, tokens - 1)

    def score(model, tokenizer, longest):
        def of(policy, document, largest):
            capacity = slots_for(largest, None, longest, chunk)
            reading = read(model, policy, document.prompt, capacity=capacity, chunk=chunk, prompt=prompt)
            scored = reading.nll[(prompt or 1) - 1 :].astype(np.float64)
            parts = [scored[start : start + bucket] for start in range(0, len(scored), bucket)]
            return {"nll": scored.mean(), "nll_by_position": [part.mean() for part in parts]} | memory(reading.usage)

        return of

    settings = {"tokens": tokens, "prompt": prompt, "bucket": bucket}
    documents = partial(_documents, texts=data, tokens=tokens, limit=limit)
    common = model, dtype, specs, budget, chunk, limit, seed, out
    _go("perplexity", common, settings, data, lambda model, tokenizer: documents(tokenizer), score)


@evaluate.command()
@_options
@_texts
@click.option("--tokens", type=int, default=2048, show_default=True, help="of each stretch of a text")
@click.option("--prompt", type=int, help="how many of them are the prompt; not scored  [default: half]")
def agreement(model, dtype, specs, budget, chunk, limit, seed, out, paths, tokens, prompt):
    """How close predictions stay to those of the full cache: KL, and how often the likeliest token is the same."""
    data, prompt = _files(paths), tokens // 2 if prompt is None else prompt
    for spec in specs or POLICIES:
        prompt_of(parse(spec), prompt, tokens - 1)

    def score(model, tokenizer, longest):
        def of(policy, document, largest):
            found = agreements.compare(model, policy, document.prompt, prompt, chunk)
            names = ("kl", "same", "nll", "full_nll")
            return {name: float(getattr(found, name).mean(dtype=np.float64)) for name in names} | memory(found.usage)

        return of

    common = model, dtype, specs, budget, chunk, limit, seed, out
    documents = partial(_documents, texts=data, tokens=tokens, limit=limit)
    settings = {"tokens": tokens, "prompt": prompt}
    _go("agreement", common, settings, data, lambda model, tokenizer: documents(tokenizer), score)


@evaluate.command()
@_options
@_texts
@click.option("--task", "names", multiple=True, default=tuple(recalls.TASKS), show_default=True)
@click.option("--length", "lengths", type=int, multiple=True, default=(1024,), show_default=True, help="of a prompt")
@click.option("--depth", "depths", type=float, multiple=True, default=(0.1, 0.5, 0.9), show_default=True)
def recall(model, dtype, specs, budget, chunk, limit, seed, out, paths, names, lengths, depths):
    """Whether what was read long ago is still known: pass keys, needles, pairs, a passage seen again.

    There are --limit examples of each task, length and depth, or 5.

    `nll` is that of the right answer, in nats a token; `margin` is how much likelier it is than the likeliest of the
    wrong ones; `exact` says whether the model writes it down by itself.
    """
    data = _files(paths)
    words = "\n\n".join(content.decode("utf-8") for content in data.values())

    def examples(model, tokenizer):
        hay = recalls.Haystack(tokenizer, words)
        return list(recalls.tasks(hay, names, lengths, depths, limit or 5, seed))

    def score(model, tokenizer, longest):
        def of(policy, task, largest):
            asked = ask(
                model, policy, task.prompt, slots_for(largest, None, longest + len(task.gold) + 32, chunk), chunk
            )
            nll = partial(answer_nll, model, policy, asked, chunk=chunk)
            found: dict[str, Any] = {"length": task.length, "depth": task.depth, "nll": nll(task.gold)}
            if task.others:
                found["margin"] = min(map(nll, task.others)) - found["nll"]
            if task.task != "repeat":
                wrote, _ = answer(model, policy, asked, len(task.gold) + 2, tokenizer.end)
                said, gold = tokenizer.decode(wrote).strip(), tokenizer.decode(task.gold).strip()
                found |= {"exact": float(said.startswith(gold)), "answer": said}
            return found | memory(asked.usage)

        return of

    common = model, dtype, specs, budget, chunk, limit, seed, out
    settings = {"tasks": list(names), "lengths": list(lengths), "depths": list(depths)}
    _go("recall", common, settings, data, examples, score)


@evaluate.command()
@_options
@click.option("--data", type=click.Path(path_type=Path), required=True, help="a directory with <task>.jsonl")
@click.option("--task", "names", multiple=True, help="repeat for more  [default: all that are there]")
@click.option("--length", type=int, default=3500, show_default=True, help="longer prompts lose their middle")
@click.option("--chat", is_flag=True, help="wrap questions as a user's turn, as LongBench does for chat models")
def longbench(model, dtype, specs, budget, chunk, limit, seed, out, data, names, length, chat):
    """LongBench: its prompts, truncation and metrics, in [0, 1]."""
    names = list(names) or [task for task in benchmark.METRICS if (data / f"{task}.jsonl").exists()]
    if not names:
        raise CormError(f"there is no task of LongBench in {data}: it should hold files such as qasper.jsonl")
    for package in ("rapidfuzz", "rouge_score"):
        if find_spec(package) is None:
            raise CormError(f"{package} is not installed: pip install 'corm-jax[evaluation]'")
    files = [path for task in names if (path := data / f"{task}.jsonl").exists()]

    def examples(model, tokenizer):
        return list(benchmark.questions(data, names, tokenizer, length, chat, limit))

    def score(model, tokenizer, longest):
        def of(policy, question, largest):
            asked = ask(model, policy, question.prompt, slots_for(largest, None, length + 512, chunk), chunk)
            wrote, used = answer(model, policy, asked, question.new_tokens, tokenizer.end)
            said = tokenizer.decode(wrote)
            return {"score": benchmark.score(question, said), "answer": said} | memory(used)

        return of

    common = model, dtype, specs, budget, chunk, limit, seed, out
    settings = {"tasks": names, "length": length, "chat": chat}
    _go("longbench", common, settings, contents(files), examples, score)


@click.command("report")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default="report.md", show_default=True)
def report(folders, out):
    """Put the results of several runs of corm eval on one Markdown page, with figures."""
    plots.check_picture(out.with_suffix(".png"))
    write_report(folders, out)
    print(out)


@click.command("analyse")
@console.model_options
@click.option("--text", type=click.Path(path_type=Path), help="a UTF-8 file  [default: Python's language reference]")
@click.option("--tokens", type=int, default=2048, show_default=True, help="how many to read")
@click.option("--out", type=click.Path(path_type=Path), default="analysis.json", show_default=True)
def analyse(model, dtype, text, tokens, out):
    """Check what CORM rests on: sparse attention, queries alike, and recent ones that tell which keys matter."""
    check_writable(out)
    plots.check_picture(out.with_suffix(".png"))
    words, name = inputs.text_from(text)
    network, tokenizer = inputs.load(model, dtype)
    ids = inputs.encode(network, tokenizer, words, name, tokens)
    with console.progress_bar() as progress:
        task = progress.add_task(f"{network.config.layers} layers", total=network.config.layers * tokens)
        found = analysis.analyse(network, ids, lambda done: progress.update(task, completed=done))
    plots.analysis(found, out.with_suffix(".png"))
    write_json(out, {"model": model, "text": name, "tokens": tokens} | found)
    table = Table(title=f"{model} reads {tokens:,} tokens of {name}", title_justify="left")
    for column in ("what", "mean over layers", "least of a layer", "most of a layer"):
        table.add_column(column)

    def row(what, values):
        table.add_row(what, f"{np.mean(values):.3f}", f"{np.min(values):.3f}", f"{np.max(values):.3f}")

    row("keys below 1/t", np.mean(found["sparsity"], axis=1))
    for index, distance in enumerate(found["distances"]):
        row(f"cosine of queries {distance} apart", np.array(found["similarity"])[:, index])
    for index, window in enumerate(found["windows"]):
        row(f"important keys that the last {window} queries knew", np.array(found["coverage"])[:, index])
    for w, window in enumerate(found["windows"]):
        row(f"kept with w = {window}, r = {found['recents'][-1]}", np.array(found["kept"])[:, w, -1])
    for index, bits in enumerate(found["bits"]):
        row(f"error of the cosine from {bits} signs", np.array(found["lsh_error"])[:, index])
    console.output().print(table)
    print(f"{out}, {out.with_suffix('.png')}")
