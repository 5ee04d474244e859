"""How stable calibration is over texts, drawn tokens, lengths and probes, on SmolLM2.

    python benchmarks/profile_stability.py --text FILE... [--tokens 1536] [--target-live 0.2] [--seeds 1 2]
        [--lengths 512 1024] [--probes 64 128 384] --work DIR --out DIR

The base is the first text, `--tokens` of it, seed 0, 256 of them read again. Every other calibration differs from it in
one thing: the text; the seed of the tokens that the model draws, which what a second reading needs does not depend on;
how many tokens are read (of less than 1,024 a quarter again); how many of them are read again. Prints what each says
as the base does: the correlation over heads of what a second reading needs, and how many of its first nine heads are
the same; the correlation of what heads keep; the share of heads with the same (w, r, m); and how much more the base
would lose, by its own costs, with the other's choices. All are of one size, `--target-live` of the base's keys.
Profiles are written into `--out`, to be read by `benchmarks/profile_table.py`.
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
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--target-live", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--probes", type=int, nargs="*", default=[64, 128, 384])
    parser.add_argument("--work", type=Path, required=True, help="as for corm calibrate")
    parser.add_argument("--out", type=Path, required=True)
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
        f"| {first.name}, {arguments.tokens:,} tokens, against | second reading: correlation | the same of the first 9 "
        "| live: correlation | the same (w, r, m) | loses more, % |"
    )
    print("|---|---|---|---|---|---|")
    for name, option in varied:
        found = cost(**option)
        choice = sized(found, base, arguments.target_live)
        save(name, choice, found)
        print(f"| {name} | {alikeness(base, found, own, choice)} |", flush=True)


def sized(cost: Cost, base: Cost, target: float) -> np.ndarray:
    """The choices by one cost that keep a share of the base's keys, as nearly below it as they come."""
    low, high = float(cost.live.min(0).mean()), 1.0
    for _ in range(30):
        middle = (low + high) / 2
        choice = choose(cost.live, cost.loss, middle)
        low, high = (middle, high) if chosen(base.live, choice).mean() <= target else (low, middle)
    return choose(cost.live, cost.loss, low)


def alikeness(base: Cost, other: Cost, own: np.ndarray, choice: np.ndarray) -> str:
    """How much two costs, and the choices by them, say alike."""
    gains = [np.maximum(cost.again[0], 0).reshape(-1) for cost in (base, other)]
    nine = [set(np.argsort(-gain)[:9]) for gain in gains]
    lives = [chosen(base.live, one).reshape(-1) for one in (own, choice)]
    losses = [chosen(base.loss, one).sum() for one in (own, choice)]
    numbers = f"{np.corrcoef(gains)[0, 1]:.2f} | {len(nine[0] & nine[1])} | {np.corrcoef(lives)[0, 1]:.2f}"
    return f"{numbers} | {np.mean(own == choice):.2f} | {100 * (losses[1] / losses[0] - 1):.0f}"


if __name__ == "__main__":
    main()
