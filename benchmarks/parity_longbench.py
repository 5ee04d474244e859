"""Compares answers to LongBench with the full cache with those of transformers' greedy decoding, one by one.

    python benchmarks/parity_longbench.py DIRECTORY [--examples 20] [--length 1024]

DIRECTORY holds LongBench's rows, as for `corm eval longbench --data`. The model is SmolLM2 in float32, on the CPU; the
prompts are the first rows of each task in turn. The script prints each answer that differs, and both mean scores. The
exit code is 1 if an answer differs.
"""

import argparse
import sys
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import corm_jax as cj
from corm_jax.evaluation import longbench
from corm_jax.evaluation.asking import answer, ask
from corm_jax.model import named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="LongBench's rows, as for corm eval longbench --data")
    parser.add_argument("--examples", type=int, default=20, help="prompts to answer")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt, at most")
    arguments = parser.parse_args()
    model, tokenizer = cj.load()
    path = named.model_file()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    names = [name for name in longbench.METRICS if (arguments.directory / f"{name}.jsonl").exists()]
    limit = -(-arguments.examples // len(names))
    by_task = [
        longbench.questions(arguments.directory, [name], tokenizer, arguments.length, True, limit) for name in names
    ]
    questions = [one for one in chain(*zip_longest(*by_task)) if one][: arguments.examples]
    scores, differ = [], 0
    for question in questions:
        asked = ask(model, cj.Full(), question.prompt, arguments.length + 512, 256)
        ours, _ = answer(model, cj.Full(), asked, question.new_tokens, tokenizer.end)
        ids = torch.tensor([question.prompt])
        with torch.no_grad():
            out = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=question.new_tokens,
                do_sample=False,
                eos_token_id=list(tokenizer.end),
                pad_token_id=tokenizer.end[0],
            )
        found = [token for token in out[0, len(question.prompt) :].tolist() if token not in tokenizer.end]
        both = [tokenizer.decode(ids) for ids in (ours, found)]
        scores.append([longbench.score(question, said) for said in both])
        differ += ours != found
        print(f"{question.id}: {'the same' if ours == found else both}", flush=True)
    mean = np.mean(scores, axis=0)
    print(f"{len(questions)} prompts, {differ} answers differ; mean score {mean[0]:.4f} (ours), {mean[1]:.4f} (theirs)")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
