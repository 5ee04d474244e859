"""``corm eval``: policies on tasks, example by example."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np

from corm_jax.command import inputs
from corm_jax.command.options import model_options, texts_options
from corm_jax.core.capacity import slots_for
from corm_jax.core.policy import Policy
from corm_jax.errors import CormError
from corm_jax.evaluation import agreement as agreements
from corm_jax.evaluation import longbench as benchmark
from corm_jax.evaluation import recall as recalls
from corm_jax.evaluation.asking import ANSWER, answer, answer_nll, ask
from corm_jax.evaluation.records import Records, check_free
from corm_jax.evaluation.rows import FORMAT, Kind, Run
from corm_jax.evaluation.suite import Suite, checksum, memory, surroundings
from corm_jax.evaluation.summary import MEASURES, lines
from corm_jax.evaluation.texts import read_texts, stretches
from corm_jax.model.decoder import Decoder, hidden, windows_of
from corm_jax.model.prompts import scored_from
from corm_jax.model.tokenizer import Tokenizer
from corm_jax.policies import keys_of, lacks_window, on_budget, parse
from corm_jax.runs.perplexity import read_text
from corm_jax.terminal import console
from corm_jax.terminal.console import COUNT, SEED, Budget, Real, Spec, Whole
from corm_jax.terminal.tables import Column, print_table

SMALL_CHUNK = 1024
"""A chunk of up to this many tokens is accepted even if every prompt is shorter."""

POLICIES = ("full", "corm", "streaming_llm", "h2o:attention=mean", "tova", "snapkv", "random")


@dataclasses.dataclass(frozen=True)
class Job:
    """The options that all kinds of ``corm eval`` share."""

    kind: Kind
    model: str
    dtype: str
    specs: Sequence[str]
    budget: str | None
    chunk: int
    limit: int | None
    seed: int
    out: Path

    def run(
        self,
        settings: dict[str, Any],
        data: Mapping[str, str | bytes],
        make_examples: Callable[[Decoder, Tokenizer], Sequence[Any]],
        make_score: Callable[[Decoder, Tokenizer, Sequence[Any]], Callable[[Policy, Any, Policy], dict[str, Any]]],
    ) -> None:
        """Scores every example under every policy, writes the results into the directory, and prints the table.

        Args:
          settings: the options of this kind of evaluation.
          data: the texts or files from which the examples are made, by name.
          make_examples: makes the examples, from the model and the tokenizer.
          make_score: makes the function that scores a policy on an example, see `Suite.run`.
        """
        model, tokenizer = inputs.load(self.model, self.dtype)
        inputs.check_profiles(self.specs, self.model, model)
        examples = make_examples(model, tokenizer)
        if not examples:
            raise CormError(f"there is nothing to read in {', '.join(data)}: give more")
        longest = max(len(example.prompt) for example in examples)
        if self.chunk > max(longest, SMALL_CHUNK):  # the rest of the chunk would be padding, which takes memory
            raise CormError(f"--chunk {self.chunk:,} is more than the longest prompt, {longest:,} tokens: lower it")
        inputs.note_context(model, longest)
        if self.budget is None:
            console.note_budgets(self.specs)
        shortest = min(len(example.prompt) for example in examples)
        console.note_small_budgets(self.specs, shortest, settings.get("prompt"))
        for spec in self.specs:
            if self.budget and not lacks_window(spec):
                with console.naming({"--policy": spec, "--budget": self.budget, "the shortest prompt": shortest}):
                    parse(on_budget(spec, min(keys_of(self.budget, shortest), shortest)))
        run = Run(
            format=FORMAT,
            kind=self.kind,
            model=self.model,
            dtype=hidden(model).dtype.name,
            policies=list(self.specs),
            budget=self.budget,
            chunk=self.chunk,
            limit=self.limit,
            seed=self.seed,
            settings=settings,
            begin=list(tokenizer.begin),
            prompts=checksum(*map(json.dumps, examples)),
            **surroundings(model, data),
        )
        suite = Suite(model, self.specs, self.budget, self.chunk)
        with Records(self.out, run) as records, console.progress_bar() as progress:
            if records.rows:
                print(f"corm: note: {len(records.rows):,} results of an earlier run are kept", file=sys.stderr)
            task = progress.add_task(self.kind, total=len(examples) * len(self.specs))
            score = make_score(model, tokenizer, examples)
            suite.run(records, examples, score, lambda n: progress.update(task, completed=n))
        _table(self.kind, records.rows)


@click.group("eval", cls=console.Group)
def evaluate():
    """Score policies on tasks, example by example, and write the results into a directory.

    If a run is interrupted, the same command goes on after the last example that was scored.
    """


_options = console.options(
    model_options,
    click.option(
        "--policy", "specs", type=Spec(), multiple=True, metavar="SPEC", help="name:option=value,...; repeat to compare"
    ),
    click.option(
        "--budget",
        type=Budget(),
        metavar="KEYS",
        help="keys of a head that stay at most under each policy but full, or a share of the prompt such as 0.25",
    ),
    click.option("--chunk", type=COUNT, default=16, show_default=True, help="tokens between two evictions; 1 is exact"),
    click.option("--limit", type=COUNT, help="the most examples of each task"),
    click.option("--seed", type=SEED, default=0, show_default=True, help="of the tasks that are drawn at random"),
    click.option("--out", type=click.Path(path_type=Path), required=True, help="the directory of the results"),
)
_blind = click.option("--blind", is_flag=True, help="leave out the text that holds the answer: what can be guessed")


def _command(kind: Kind):
    """Makes a kind of ``corm eval``. The function gets the options that all kinds share as one `Job`."""

    def decorate(function):
        @wraps(function)
        def run(model, dtype, specs, budget, chunk, limit, seed, out, **own):
            specs = list(dict.fromkeys(specs or POLICIES))
            job = Job(kind, model, dtype, specs, budget, chunk, limit, seed, out)
            check_free(out)
            return function(job, **own)

        return evaluate.command(kind)(_options(run))

    return decorate


def _table(kind: str, rows: list[dict[str, Any]]) -> None:
    found = list(lines(kind, rows))
    measures = [measure for measure in MEASURES if any(measure in line.measures for line in found)]
    columns = [Column("task"), Column("policy"), Column("examples", number=True), Column("kept", number=True)]
    columns += [Column(name, number=True) for name in (*measures, f"{measures[0]} - full")]
    cells = [
        (
            line.task,
            line.policy,
            str(line.examples),
            f"{line.kept:.3f}",
            *(str(line.measures.get(measure, "")) for measure in measures),
            str(line.against or ""),
        )
        for line in found
    ]
    print_table(columns, cells, title=f"{kind}: means over examples [95% interval]")


@_command("perplexity")
@texts_options
@click.option("--tokens", type=Whole(2), default=2048, show_default=True, help="of each part into which a text is cut")
@click.option("--prompt", type=COUNT, help="how many of them are the prompt, which is not scored")
@click.option("--bucket", type=COUNT, default=512, show_default=True, help="positions whose NLL is averaged together")
def perplexity(job: Job, paths, datasets, tokens, prompt, bucket):
    """How well texts are predicted: the negative log-likelihood (NLL), of all tokens and by position."""
    for spec in job.specs:
        console.check_prompt(spec, parse(spec), prompt, tokens - 1)
    data = read_texts(paths, datasets)

    def score(model, tokenizer, documents):
        longest, first = max(len(one.prompt) for one in documents), scored_from(tokenizer, prompt)

        def of(policy, document, largest):
            capacity = slots_for(largest, None, longest, job.chunk, windows_of(model.config))
            reading = read_text(model, policy, document.prompt, capacity=capacity, chunk=job.chunk, prompt=prompt)
            scored = reading.nll[first - 1 :].astype(np.float64)
            parts = [scored[start : start + bucket] for start in range(0, len(scored), bucket)]
            return {"nll": scored.mean(), "nll_by_position": [part.mean() for part in parts]} | memory(reading.usage)

        return of

    settings = {"tokens": tokens, "prompt": prompt, "bucket": bucket}
    job.run(settings, data, lambda model, tokenizer: stretches(tokenizer, data, tokens, job.limit), score)


@_command("agreement")
@texts_options
@click.option("--tokens", type=Whole(2), default=2048, show_default=True, help="of each part into which a text is cut")
@click.option("--prompt", type=COUNT, help="how many of them are the prompt, which is not scored  [default: half]")
def agreement(job: Job, paths, datasets, tokens, prompt):
    """How close predictions are to those of the full cache.

    `kl` is the KL divergence, in nats a token; `same` is how often the likeliest token is the same.
    """
    prompt = tokens // 2 if prompt is None else prompt
    for spec in job.specs:
        console.check_prompt(spec, parse(spec), prompt, tokens - 1)
    data = read_texts(paths, datasets)

    def score(model, tokenizer, documents):
        scored = slice(scored_from(tokenizer, prompt) - prompt, None)

        def of(policy, document, largest):
            found = agreements.measure(model, policy, document.prompt, prompt, job.chunk)
            names = ("kl", "same", "nll", "full_nll")
            means = {name: float(getattr(found, name)[scored].mean(dtype=np.float64)) for name in names}
            return means | memory(found.usage)

        return of

    settings = {"tokens": tokens, "prompt": prompt}
    job.run(settings, data, lambda model, tokenizer: stretches(tokenizer, data, tokens, job.limit), score)


@_command("recall")
@texts_options
@click.option("--task", "names", multiple=True, default=tuple(recalls.TASKS), show_default=True, help="repeat for more")
@click.option(
    "--length",
    "lengths",
    type=COUNT,
    multiple=True,
    default=(1024,),
    show_default=True,
    help="tokens of a prompt; repeat for more",
)
@click.option(
    "--depth",
    "depths",
    type=Real(0, 1),
    multiple=True,
    default=(0.1, 0.5, 0.9),
    show_default=True,
    help="where the answer is, from the prompt's beginning (0) to its end (1); repeat for more",
)
@_blind
def recall(job: Job, paths, datasets, names, lengths, depths, blind):
    """Whether the model can recall what it read long ago: pass keys, needles, pairs, a passage that comes again.

    For each task, length and depth there are 5 examples, or --limit.

    `nll` is the negative log-likelihood of the right answer, in nats a token. `margin` is that of the likeliest wrong
    answer minus `nll`. `exact` is the share of the examples in which the model writes the right answer by itself.
    """
    limit = job.limit or 5
    recalls.check(names, lengths, depths, limit, job.seed)
    data = read_texts(paths, datasets)

    def examples(model, tokenizer):
        hay = recalls.Haystack(tokenizer, "\n\n".join(data.values()))
        return list(recalls.tasks(hay, names, lengths, depths, limit, job.seed, blind))

    def score(model, tokenizer, tasks):
        # Caches of one size for a task, however long its answers are, so that one program serves them all.
        longest, most = max(len(task.prompt) for task in tasks), dict[tuple[str, int], int]()
        for task in tasks:
            place = task.task, task.length
            most[place] = max(most.get(place, 0), *map(len, (task.gold, *task.others)))

        def of(policy, task, largest):
            tokens = longest + most[task.task, task.length] + ANSWER
            asked = ask(model, policy, task.prompt, tokens, job.chunk, largest=largest)
            nll = partial(answer_nll, model, policy, asked, chunk=job.chunk)
            found: dict[str, Any] = {"length": task.length, "depth": task.depth, "nll": nll(task.gold)}
            if task.others:
                found["margin"] = min(map(nll, task.others)) - found["nll"]
            if task.task != "repeat":
                wrote, _ = answer(model, policy, asked, len(task.gold) + 2, tokenizer.end)
                said, gold = tokenizer.decode(wrote).strip(), tokenizer.decode(task.gold).strip()
                found |= {"exact": float(said.startswith(gold)), "answer": said}
            return found | memory(asked.usage)

        return of

    settings = {"tasks": list(names), "lengths": list(lengths), "depths": list(depths), "blind": blind}
    job.run(settings, data, examples, score)


@_command("longbench")
@click.option(
    "--data", "folder", type=click.Path(path_type=Path), required=True, help="a directory with <task>.jsonl files"
)
@click.option("--task", "names", multiple=True, help="repeat for more  [default: all in the directory]")
@click.option(
    "--length",
    type=COUNT,
    default=3500,
    show_default=True,
    help="tokens of a prompt; a longer one is cut in its middle",
)
@click.option("--chat", is_flag=True, help="wrap questions as a user's turn, as LongBench does for chat models")
@_blind
def longbench(job: Job, folder, names, length, chat, blind):
    """LongBench, with its own prompts, truncation and metrics; scores are from 0 to 1."""
    names = list(dict.fromkeys(names)) or benchmark.there(folder)
    for package in ("rapidfuzz", "rouge_score"):
        if find_spec(package) is None:
            raise CormError(f"{package} is not installed: pip install 'corm-jax[evaluation]'")
    data = benchmark.contents(folder, names)

    def examples(model, tokenizer):
        return list(benchmark.questions(folder, names, tokenizer, length, chat, job.limit, blind))

    def score(model, tokenizer, questions):
        needed = max(len(one.prompt) for one in questions) + max(one.new_tokens for one in questions)
        tokens = max(min(length, needed) + 512, needed)  # a chat template may make a prompt longer than --length

        def of(policy, question, largest):
            asked = ask(model, policy, question.prompt, tokens, job.chunk, largest=largest)
            wrote, used = answer(model, policy, asked, question.new_tokens, tokenizer.end)
            said = tokenizer.decode(wrote)
            return {"score": benchmark.score(question, said), "answer": said} | memory(used)

        return of

    job.run({"tasks": names, "length": length, "chat": chat, "blind": blind}, data, examples, score)
