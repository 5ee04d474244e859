"""Compares SmolLM2 here with SmolLM2 in Hugging Face transformers (torch, CPU): the NLL of the same text.

    pip install -e ".[test]"; python benchmarks/parity_transformers.py [--text FILE] [--tokens 256]

transformers reads the same GGUF file, with its tokenizer and its chat template, by its own code. The exit code is 1 if
the mean NLL differs by more than 1e-4, or if the tokens, the chat prompts or a greedy continuation differ. Tokens are
compared on the text without its digits: transformers ignores the field ``tokenizer.ggml.pre`` of the file, which says
that every digit is a token by itself.
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
@click.option("--tokens", default=256, show_default=True, help="how many tokens to read")
def main(text, tokens):
    """Compare SmolLM2 here with SmolLM2 in Hugging Face transformers, on the same text."""
    words, name = text_from(text)
    model, tokenizer = checkpoint.load()
    ids = encode(model, tokenizer, words, name, tokens)

    path = named.model_file()
    their_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    wordy = re.sub(r"\d", "", words)
    same_tokens = their_tokenizer(wordy)["input_ids"] == tokenizer.encode(wordy)
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0]
        answer = theirs.generate(
            torch.tensor([ids[:32]]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    nll = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]), reduction="none").numpy()
    reading = read_text(model, Full(), ids)
    same_answer = answer[0, 32:].tolist() == generate(model, Full(), [ids[:32]], max_new_tokens=32).tokens[0]
    question = "Name three rivers."
    chat = their_tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    same_chat = chat == tokenizer.chat(question)

    difference = abs(float(reading.nll.mean(dtype=np.float64)) - nll.mean())
    print(f"tokens of the whole text, {len(tokenizer.encode(wordy)):,}:      {'equal' if same_tokens else 'DIFFER'}")
    print(f"mean NLL over {tokens - 1} predictions: ours {reading.nll.mean():.6f}, transformers {nll.mean():.6f}")
    print(
        f"  difference of means {difference:.2e}, largest difference of a token {np.abs(reading.nll - nll).max():.2e}"
    )
    print(f"32 greedy tokens:                       {'equal' if same_answer else 'DIFFER'}")
    print(f"chat prompt:                            {'equal' if same_chat else 'DIFFERS'}")
    sys.exit(not (difference <= 1e-4 and same_tokens and same_answer and same_chat))


if __name__ == "__main__":
    main()
