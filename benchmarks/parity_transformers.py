"""Compares a named model here with the same model in Hugging Face transformers (torch, CPU): the NLL of the same text.

    pip install -e ".[test]"; python benchmarks/parity_transformers.py [--model gemma-3-270m] [--text FILE]

transformers reads the same GGUF file, with its tokenizer and its chat template, by its own code; with Gemma that takes
minutes. The exit code is 1 if the mean NLL differs by more than 1e-4, or if the tokens, the chat prompts or a greedy
continuation differ. SmolLM2's tokens are compared on the text without its digits: transformers ignores the field
``tokenizer.ggml.pre`` of the file, which says that every digit is a token by itself.
"""

import re
import sys
from pathlib import Path

import click
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from corm_jax import Full, generate
from corm_jax.command.inputs import encode, text_from
from corm_jax.model import checkpoint, named
from corm_jax.runs.perplexity import read_text


@click.command()
@click.option("--text", type=click.Path(path_type=Path), help="a UTF-8 file  [default: Python's language reference]")
@click.option("--tokens", default=(256,), multiple=True, help="how many to read; repeat for more  [default: 256]")
@click.option("--model", "name", type=click.Choice(list(named.MODELS)), default=named.DEFAULT, show_default=True)
def main(text, tokens, name):
    """Compare a named model here with the same model in Hugging Face transformers, on the same text."""
    words, title = text_from(text)
    model, tokenizer = checkpoint.load(name)
    ids = encode(model, tokenizer, words, title, max(tokens))

    path = named.model_file(name)
    their_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    wordy = re.sub(r"\d", "", words) if name == "smollm2-135m" else words
    same_tokens = their_tokenizer(wordy)["input_ids"] == tokenizer.encode(wordy)
    print(f"{name}, {title}")
    print(f"tokens of the whole text, {len(tokenizer.encode(wordy)):,}:      {'equal' if same_tokens else 'DIFFER'}")
    worst = 0.0
    for count in tokens:
        with torch.no_grad():
            logits = theirs(torch.tensor([ids[:count]])).logits[0, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:count]), reduction="none").numpy()
        ours = read_text(model, Full(), ids[:count]).nll
        difference = abs(float(ours.mean(dtype=np.float64)) - nll.mean())
        print(f"mean NLL over {count - 1} predictions: ours {ours.mean():.6f}, transformers {nll.mean():.6f}")
        print(
            f"  difference of means {difference:.2e}, largest difference of a token {np.abs(ours - nll).max():.2e}",
            flush=True,
        )
        worst = max(worst, difference)
    with torch.no_grad():
        answer = theirs.generate(
            torch.tensor([ids[:32]]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    same_answer = answer[0, 32:].tolist() == generate(model, Full(), [ids[:32]], max_new_tokens=32).tokens[0]
    print(f"32 greedy tokens:                       {'equal' if same_answer else 'DIFFER'}")
    same_chat = True
    if their_tokenizer.chat_template:
        question = "Name three rivers."
        chat = their_tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        same_chat = chat == tokenizer.chat(question)
        print(f"chat prompt:                            {'equal' if same_chat else 'DIFFERS'}")
    sys.exit(not (worst <= 1e-4 and same_tokens and same_answer and same_chat))


if __name__ == "__main__":
    main()
