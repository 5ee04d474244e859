"""How much calibration depends on the text, the drawn tokens, the length and the probe, on SmolLM2.

    python benchmarks/profile_stability.py --text FILE... [--tokens 1536] [--target-live 0.2] [--seeds 1 2]
        [--lengths 512 1024] [--probes 64 128 384] --work DIR --out DIR

The base is a calibration on the first text: `--tokens` tokens, seed 0, and a probe of 256 tokens, which are read a
second time. Every other calibration differs from the base in one thing:

- the text;
- the seed of the tokens that the model draws (the second reading does not depend on it);
- how many tokens are read (if fewer than 1,024, a quarter of them is read a second time);
- how many of them are read a second time.

Each row of the table compares a calibration with the base: the correlation over heads of what the second reading needs;
how many of the nine heads that it needs most are the same; the correlation of how much each head keeps; the share of
heads with the same (w, r, m); and how much more would be lost, by the costs of the base, with the other choices. All
choices keep the same share of the base's keys, `--target-live`. Profiles are written into `--out`;
`benchmarks/profile_table.py` reads them.
"""

import argparse
from pathlib import Path

import numpy as np

import corm_jax as cj
from corm_jax.command.inputs import encode
from corm_jax.evaluation.texts import read_text
from corm_jax.files import make_directory
from corm_jax.runs import calibrate
from corm_jax.runs.calibrate import AGAIN, Cost, choose, chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 files")
    parser.add_argument("--tokens", type=int, default=1536, help="how many tokens of a text to read")
    parser.add_argument("--target-live", type=float, default=0.2, help="share of the keys that a profile keeps")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2], help="other seeds of the drawn tokens")
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024], help="other numbers of tokens")
    parser.add_argument("--probes", type=int, nargs="*", default=[64, 128, 384], help="other sizes of the probe")
    parser.add_argument("--work", type=Path, required=True, help="as for corm calibrate")
    parser.add_argument("--out", type=Path, required=True, help="directory for the profiles")
    arguments = parser.parse_args()
    make_directory(arguments.work)
    make_directory(arguments.out)
    model, tokenizer = cj.load()
    first, *others = arguments.text

    def cost(text: Path = first, tokens: int = arguments.tokens, seed: int = 0, again: int = AGAIN) -> Cost:
        ids = encode(model, tokenizer, read_text(text), str(text), tokens)
        return calibrate.costs(
            model, {text.name: ids}, begin=len(tokenizer.begin), seed=seed, again=again, work=arguments.work
        )[0]

    def save(name: str, choice: np.ndarray, found: Cost) -> None:
        made = {"variant": name}
        calibrate.profile("smollm2-135m", choice, found, made).save(arguments.out / f"{name}.json")

    base = cost()
    own = sized(base, base, arguments.target_live)
    save("base", own, base)
    varied = [(f"text-{text.stem}", {"text": text}) for text in others]
    for name, option, values in (
        ("seed", "seed", arguments.seeds),
        ("length", "tokens", arguments.lengths),
        ("probe", "again", arguments.probes),
    ):
        varied += [(f"{name}-{value}", {option: value}) for value in values]
    print(
        f"| {first.name}, {arguments.tokens:,} tokens, against | second reading: correlation | 9 heads: the same "
        "| live: correlation | the same (w, r, m) | more is lost, % |"
    )
    print("|---|---|---|---|---|---|")
    for name, option in varied:
        found = cost(**option)
        choice = sized(found, base, arguments.target_live)
        save(name, choice, found)
        print(f"| {name} | {alikeness(base, found, own, choice)} |", flush=True)


def sized(cost: Cost, base: Cost, target: float) -> np.ndarray:
    """The choices by one cost that keep as much as possible of the base's keys, but at most the target."""
    low, high = float(cost.live.min(0).mean()), 1.0
    for _ in range(30):
        middle = (low + high) / 2
        choice = choose(cost.live, cost.loss, middle)
        low, high = (middle, high) if chosen(base.live, choice).mean() <= target else (low, middle)
    return choose(cost.live, cost.loss, low)


def alikeness(base: Cost, other: Cost, own: np.ndarray, choice: np.ndarray) -> str:
    """The cells of the table: how much two costs, and the choices by them, agree."""
    gains = [np.maximum(cost.again[0], 0).reshape(-1) for cost in (base, other)]
    nine = [set(np.argsort(-gain)[:9]) for gain in gains]
    lives = [chosen(base.live, one).reshape(-1) for one in (own, choice)]
    losses = [chosen(base.loss, one).sum() for one in (own, choice)]
    numbers = f"{np.corrcoef(gains)[0, 1]:.2f} | {len(nine[0] & nine[1])} | {np.corrcoef(lives)[0, 1]:.2f}"
    return f"{numbers} | {np.mean(own == choice):.2f} | {100 * (losses[1] / losses[0] - 1):.0f}"


if __name__ == "__main__":
    main()
