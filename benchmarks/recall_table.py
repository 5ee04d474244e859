"""All policies at equal memory, on SmolLM2: how well they recall what was said in a prompt.

    python benchmarks/recall_table.py DIRECTORY [--examples 5] [--budget 0.1 0.25 0.5] [--json FILE]

DIRECTORY holds three files of other projects: `kv_retrieval_75_keys.jsonl` (lost-in-the-middle) asks for the value of a
key; `niah_multikey_3_4096.jsonl` (RULER) asks for the uuid that belongs to another uuid; `passkey_examples_5k.jsonl`
(LongLM) asks for a number. The original prompts are too hard for this model, even with the full cache. So they are
shortened to 8 pairs, 8 sentences, or 24 lines of filler, and the answer is among these. The score is the mean NLL of
the tokens of the answer.

A budget is a number of keys a head, given as a share of the prompt. CORM gets the window w = r with which it keeps as
many keys at the end of the first prompt of a file, found by a search. `kept` is the live share of the keys at the end,
the mean over the examples. Intervals are 95% intervals, from 2,000 bootstrap resamples of the examples. `nothing` is
the model with the question alone, without the text.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from policy_table import SPECS, shown

import corm_jax as cj
from corm_jax.evaluation.intervals import bootstrap
from corm_jax.files import write_json
from corm_jax.model.prompts import Text, inside
from corm_jax.policies import keys_of
from corm_jax.runs.fitting import fitted
from corm_jax.runs.perplexity import read_text

PAIRS, FILLER, CHUNK = 8, 24, 16


def some(items: list, wanted: int, rng) -> list:
    """Up to `PAIRS` of the items in their order, the wanted one among them."""
    others = np.delete(np.arange(len(items)), wanted)
    chosen = rng.choice(others, min(PAIRS - 1, len(others)), replace=False)
    return [items[i] for i in sorted([wanted, *chosen])]


def pairs(rows) -> Iterator[tuple[str, str, str]]:
    for index, row in enumerate(rows):
        records, rng = row["ordered_kv_records"], np.random.default_rng(index)
        wanted = [key for key, _ in records].index(row["key"])
        data = "".join(f'"{key}": "{value}"\n' for key, value in some(records, wanted, rng))
        yield f"Extract the value of the key from the data below.\n\n{data}\n", f'"{row["key"]}": "', row["value"]


def uuids(rows) -> Iterator[tuple[str, str, str]]:
    for index, row in enumerate(rows):
        first, *sentences, question = row["input"].split("\n")
        (wanted,) = (i for i, sentence in enumerate(sentences) if row["outputs"][0] in sentence)
        chosen = some(sentences, wanted, np.random.default_rng(index))
        yield "\n".join([first, *chosen, ""]), question, " " + row["outputs"][0]


def passkeys(rows) -> Iterator[tuple[str, str, str]]:
    for row in rows:
        lines = row["input"].strip().split("\n")
        (wanted,) = (i for i, line in enumerate(lines) if row["target"] in line)
        filler = [line for i, line in enumerate(lines[1:], 1) if i != wanted][:FILLER]
        filler.insert(round(FILLER * wanted / len(lines)), lines[wanted])
        yield "\n".join([lines[0], *filler, ""]), "What is the pass key? The pass key is", " " + row["target"]


FILES = {"kv_retrieval_75_keys": pairs, "niah_multikey_3_4096": uuids, "passkey_examples_5k": passkeys}


class Asker:
    """The prompts of one file, and the answers of a policy to them."""

    def __init__(self, model, tokenizer, name, examples):
        self.model, self.name = model, name
        self.texts, self.bare, self.answers = [], [], []
        for text, question, answer in examples:
            answer = inside(tokenizer, answer)
            for asked, words in ((self.texts, text + question), (self.bare, question)):
                asked.append(Text(tokenizer, words, name).whole + answer)
            self.answers.append(len(answer))
        self.prompts = [len(ids) - answer for ids, answer in zip(self.texts, self.answers, strict=True)]
        self.full, _ = self.ask([cj.Full()] * len(self.texts))

    def ask(self, policies, texts=None):
        """The mean NLL of each answer, and the live share at the end."""
        found = []
        for policy, ids, answer in zip(policies, texts or self.texts, self.answers, strict=True):
            how = {"prompt": len(ids) - answer, "chunk": CHUNK, "capacity": max(map(len, self.texts))}
            reading = read_text(self.model, policy, ids, **how)
            found.append((reading.nll[-answer:].mean(dtype=np.float64), reading.kept[-1]))
        return np.array(found).T

    def row(self, budget, spec, nll, kept):
        """Prints a row of the table, and returns it."""
        delta = bootstrap(nll - self.full)
        print(f"| {budget} | `{spec}` | {kept.mean():.3f} | {nll.mean():.3f} | {shown(delta, '+.3f')} |", flush=True)
        row = {"file": self.name, "budget": budget, "policy": spec, "kept": float(kept.mean())}
        return row | {"nll": float(nll.mean()), "delta_nll": delta}

    def at(self, budget, spec):
        """A SPEC with a budget, and its policies, one for each prompt."""
        if spec == "corm":
            first = self.texts[0][: self.prompts[0]]
            spec, _ = fitted(spec, self.model, first, keys_of(budget, len(first)), chunk=CHUNK)
            return spec, [cj.parse(spec)] * len(self.texts)
        return spec, [cj.parse(fitted(spec, self.model, [], keys_of(budget, n))[0]) for n in self.prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="a directory with the three files")
    parser.add_argument("--examples", type=int, default=5, help="how many prompts of each file to read")
    parser.add_argument("--budget", nargs="+", default=["0.1", "0.25", "0.5"], help="shares of the prompt")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    arguments = parser.parse_args()
    model, tokenizer = cj.load()
    rows = []
    for name, examples in FILES.items():
        lines = (arguments.directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[: arguments.examples]
        asker = Asker(model, tokenizer, name, examples(map(json.loads, lines)))
        lengths = asker.prompts
        print(f"\n{name}: {len(lengths)} prompts of {min(lengths):,} to {max(lengths):,} tokens\n")
        print("| budget | policy | kept | NLL of the answer | minus the full cache's [95%] |\n|---|---|---|---|---|")
        rows.append(asker.row("-", "full", asker.full, np.ones(1)))
        nothing, _ = asker.ask([cj.Full()] * len(lengths), asker.bare)
        rows.append(asker.row("-", "nothing", nothing, np.zeros(1)))
        for budget in arguments.budget:
            for each in (*SPECS, "h2o:attention=mean,oneshot=true"):
                spec, policies = asker.at(budget, each)
                rows.append(asker.row(budget, spec, *asker.ask(policies)))
        if arguments.json:
            write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
