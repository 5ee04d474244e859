"""The command line of the evaluation: ``corm eval``, ``corm report`` and ``corm analyse``."""

import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
from corm_jax.evaluation.intervals import bootstrap
from corm_jax.evaluation.records import Records
from corm_jax.evaluation.report import report as write_report
from corm_jax.evaluation.suite import Suite, contents, memory, surroundings
from corm_jax.evaluation.summary import MEASURES, lines
from corm_jax.evaluation.texts import read_texts, stretches
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
_blind = click.option("--blind", is_flag=True, help="ask without the text that holds the answer: what is guessed")
_texts = console.options(
    click.option(
        "--text",
        "paths",
        type=click.Path(path_type=Path),
        multiple=True,
        help="a UTF-8 file, or a directory of .txt files; repeat for more  [default: Python's language reference]",
    ),
    click.option("--dataset", "datasets", multiple=True, metavar="NAME[:CONFIG[:SPLIT]]", help="texts from the hub"),
)


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
    inputs.check_profiles(specs, model_name, model)
    examples = make_examples(model, tokenizer)
    config = {"format": "corm-jax evaluation 1", "kind": kind, "model": model_name, "dtype": dtype, "policies": specs}
    config |= {"budget": budget, "chunk": chunk, "limit": limit, "seed": seed} | settings | surroundings(model, data)
    longest = max(len(example.prompt) for example in examples)
    inputs.note_context(model, longest)
    if budget is None:
        console.note_budgets(specs)
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
    found = list(lines(kind, rows))
    measures = [measure for measure in MEASURES if any(measure in line.measures for line in found)]
    table = Table(title=f"{kind}: means over examples [95%]", title_justify="left")
    for column in ("task", "policy", "examples", "kept", *measures, f"{measures[0]} - full"):
        table.add_column(column)
    for line in found:
        cells = [str(line.measures.get(measure, "")) for measure in measures]
        table.add_row(line.task, line.policy, str(line.examples), f"{line.kept:.3f}", *cells, str(line.against or ""))
    console.output().print(table)


@evaluate.command()
@_options
@_texts
@click.option("--tokens", type=int, default=2048, show_default=True, help="of each stretch of a text")
@click.option("--prompt", type=int, help="how many of them are the prompt; not scored")
@click.option("--bucket", type=int, default=512, show_default=True, help="positions that are averaged together")
def perplexity(model, dtype, specs, budget, chunk, limit, seed, out, paths, datasets, tokens, prompt, bucket):
    """How well texts are predicted: NLL, and by position."""
    data = read_texts(paths, datasets)
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
    documents = partial(stretches, texts=data, tokens=tokens, limit=limit)
    common = model, dtype, specs, budget, chunk, limit, seed, out
    _go("perplexity", common, settings, data, lambda model, tokenizer: documents(tokenizer), score)


@evaluate.command()
@_options
@_texts
@click.option("--tokens", type=int, default=2048, show_default=True, help="of each stretch of a text")
@click.option("--prompt", type=int, help="how many of them are the prompt; not scored  [default: half]")
def agreement(model, dtype, specs, budget, chunk, limit, seed, out, paths, datasets, tokens, prompt):
    """How close predictions stay to those of the full cache: KL, and how often the likeliest token is the same."""
    data, prompt = read_texts(paths, datasets), tokens // 2 if prompt is None else prompt
    for spec in specs or POLICIES:
        prompt_of(parse(spec), prompt, tokens - 1)

    def score(model, tokenizer, longest):
        def of(policy, document, largest):
            found = agreements.compare(model, policy, document.prompt, prompt, chunk)
            names = ("kl", "same", "nll", "full_nll")
            return {name: float(getattr(found, name).mean(dtype=np.float64)) for name in names} | memory(found.usage)

        return of

    common = model, dtype, specs, budget, chunk, limit, seed, out
    documents = partial(stretches, texts=data, tokens=tokens, limit=limit)
    settings = {"tokens": tokens, "prompt": prompt}
    _go("agreement", common, settings, data, lambda model, tokenizer: documents(tokenizer), score)


@evaluate.command()
@_options
@_texts
@click.option("--task", "names", multiple=True, default=tuple(recalls.TASKS), show_default=True)
@click.option("--length", "lengths", type=int, multiple=True, default=(1024,), show_default=True, help="of a prompt")
@click.option("--depth", "depths", type=float, multiple=True, default=(0.1, 0.5, 0.9), show_default=True)
@_blind
def recall(model, dtype, specs, budget, chunk, limit, seed, out, paths, datasets, names, lengths, depths, blind):
    """Whether what was read long ago is still known: pass keys, needles, pairs, a passage seen again.

    There are --limit examples of each task, length and depth, or 5.

    `nll` is that of the right answer, in nats a token; `margin` is how much likelier it is than the likeliest of the
    wrong ones; `exact` says whether the model writes it down by itself.
    """
    data = read_texts(paths, datasets)
    words = "\n\n".join(content.decode("utf-8") for content in data.values())

    def examples(model, tokenizer):
        hay = recalls.Haystack(tokenizer, words)
        return list(recalls.tasks(hay, names, lengths, depths, limit or 5, seed, blind))

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
    settings = {"tasks": list(names), "lengths": list(lengths), "depths": list(depths), "blind": blind}
    _go("recall", common, settings, data, examples, score)


@evaluate.command()
@_options
@click.option("--data", type=click.Path(path_type=Path), required=True, help="a directory with <task>.jsonl")
@click.option("--task", "names", multiple=True, help="repeat for more  [default: all that are there]")
@click.option("--length", type=int, default=3500, show_default=True, help="longer prompts lose their middle")
@click.option("--chat", is_flag=True, help="wrap questions as a user's turn, as LongBench does for chat models")
@_blind
def longbench(model, dtype, specs, budget, chunk, limit, seed, out, data, names, length, chat, blind):
    """LongBench: its prompts, truncation and metrics, in [0, 1]."""
    names = list(names) or [task for task in benchmark.METRICS if (data / f"{task}.jsonl").exists()]
    if not names:
        raise CormError(f"there is no task of LongBench in {data}: it should hold files such as qasper.jsonl")
    for package in ("rapidfuzz", "rouge_score"):
        if find_spec(package) is None:
            raise CormError(f"{package} is not installed: pip install 'corm-jax[evaluation]'")
    files = [path for task in names if (path := data / f"{task}.jsonl").exists()]

    def examples(model, tokenizer):
        return list(benchmark.questions(data, names, tokenizer, length, chat, limit, blind))

    def score(model, tokenizer, longest):
        def of(policy, question, largest):
            asked = ask(model, policy, question.prompt, slots_for(largest, None, length + 512, chunk), chunk)
            wrote, used = answer(model, policy, asked, question.new_tokens, tokenizer.end)
            said = tokenizer.decode(wrote)
            return {"score": benchmark.score(question, said), "answer": said} | memory(used)

        return of

    common = model, dtype, specs, budget, chunk, limit, seed, out
    settings = {"tasks": names, "length": length, "chat": chat, "blind": blind}
    _go("longbench", common, settings, contents(files), examples, score)


@click.command("report")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default="report.md", show_default=True)
@click.option(
    "--against", metavar="SPEC", default="full", show_default=True, help="the policy to take differences from"
)
def report(folders, out, against):
    """Put the results of several runs of corm eval on one Markdown page, with figures."""
    plots.check_picture(out.with_suffix(".png"))
    write_report(folders, out, against)
    print(out)


@click.command("analyse")
@console.model_options
@_texts
@click.option("--tokens", type=int, default=2048, show_default=True, help="how many to read of each")
@click.option("--out", type=click.Path(path_type=Path), default="analysis.json", show_default=True)
def analyse(model, dtype, paths, datasets, tokens, out):
    """Check what CORM rests on: sparse attention, queries alike, and recent ones that tell which keys matter.

    Intervals are over texts, so there are none for one text.
    """
    check_writable(out)
    plots.check_picture(out.with_suffix(".png"))
    texts = read_texts(paths, datasets)
    network, tokenizer = inputs.load(model, dtype)
    ids = {
        name: inputs.encode(network, tokenizer, words.decode("utf-8"), name, tokens) for name, words in texts.items()
    }
    layers, every = network.config.layers, []
    with console.progress_bar() as progress:
        for name, read_ids in ids.items():
            task = progress.add_task(f"{name}, {layers} layers", total=layers * tokens)
            every.append(
                analysis.analyse(network, read_ids, lambda done, task=task: progress.update(task, completed=done))
            )
    plots.analysis(analysis.mean(every), out.with_suffix(".png"))
    write_json(out, {"model": model, "tokens": tokens, "texts": dict(zip(ids, every, strict=True))})
    table = Table(title=f"{model} reads {tokens:,} tokens of {', '.join(ids)}", title_justify="left")
    for column in ("what", "mean over layers and texts [95%]", "least of a layer", "most of a layer"):
        table.add_column(column)

    def row(what, name, *place):
        values = np.array([found[name] for found in every])  # [texts, layers, ...]
        values = values[(slice(None), slice(None), *place)].reshape(*values.shape[:2], -1).mean(-1)
        by_layer = values.mean(0)
        table.add_row(what, str(bootstrap(values.mean(1))), f"{by_layer.min():.3f}", f"{by_layer.max():.3f}")

    axes = every[0]
    row("keys below 1/t", "sparsity")
    for index, distance in enumerate(axes["distances"]):
        row(f"cosine of queries {distance} apart", "similarity", index)
    for index, window in enumerate(axes["windows"]):
        row(f"important keys that the last {window} queries knew", "coverage", index)
    for index, window in enumerate(axes["windows"]):
        row(f"kept with w = {window}, r = {axes['recents'][-1]}", "kept", index, -1)
    for index, bits in enumerate(axes["bits"]):
        row(f"error of the cosine from {bits} signs", "lsh_error", index)
    console.output().print(table)
    print(f"{out}, {out.with_suffix('.png')}")
