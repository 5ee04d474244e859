"""What policies lose on a text, and of a passage that comes again, on SmolLM2.

    python benchmarks/profile_table.py --text FILE [--tokens 4096] [--passages 5] [--chunk 32] --policy SPEC...

Text: stretches of so many tokens, spread over the file; their NLL above that of the full cache, in percent, and the
share of the keys that are live at the end. Repeat: 512 tokens, 1,024 others from elsewhere in the file, the same 512
again; the NLL of the second reading, nats a token, and the share that is live when it begins. `full` comes first.
Intervals: 95%, by the bootstrap over passages. A profile must have been calibrated on other texts than FILE.
"""

import argparse
from pathlib import Path

import numpy as np

import corm_jax as cj
from corm_jax import perplexity
from corm_jax.evaluation.intervals import bootstrap
from corm_jax.inputs import check_profiles, read_text

PASSAGE, BETWEEN = 512, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 file")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=32, help="tokens between evictions")
    parser.add_argument("--policy", nargs="+", required=True, metavar="SPEC")
    arguments = parser.parse_args()
    model, tokenizer = cj.load()
    check_profiles(arguments.policy, "smollm2-135m", model)
    ids = tokenizer.encode(read_text(arguments.text))
    texts = [ids[start : start + arguments.tokens] for start in spread(ids, arguments.tokens, arguments.passages)]
    again = []
    for start in spread(ids, PASSAGE, arguments.passages):
        other = (start + len(ids) // 2) % (len(ids) - BETWEEN)
        again.append([*ids[start : start + PASSAGE], *ids[other : other + BETWEEN], *ids[start : start + PASSAGE]])
    begins = PASSAGE + BETWEEN

    def read(spec: str, passage: list[int]) -> perplexity.Reading:
        return perplexity.read(model, cj.parse(spec), passage, chunk=arguments.chunk)

    print(f"| {arguments.tokens:,} tokens | NLL above full, % | live at the end | repeat NLL | live when it begins |")
    print("|---|---|---|---|---|")
    full: list[float] = []
    for spec in ("full", *arguments.policy):
        found = [read(spec, passage) for passage in texts]
        nll = [float(one.nll.mean()) for one in found]
        full = full or nll
        above = bootstrap([100 * (mine / best - 1) for mine, best in zip(nll, full, strict=True)])
        live = bootstrap([one.kept[-1] for one in found])
        found = [read(spec, passage) for passage in again]
        second = bootstrap([float(one.nll[begins:].mean()) for one in found])
        held = np.mean([one.kept[begins // arguments.chunk - 1] for one in found])
        print(f"| `{spec}` | {above} | {live} | {second} | {held:.3f} |", flush=True)


def spread(ids: list[int], tokens: int, count: int) -> list[int]:
    """Where so many stretches of a text begin, evenly over it."""
    return np.linspace(0, len(ids) - tokens, count).astype(int).tolist()


if __name__ == "__main__":
    main()
