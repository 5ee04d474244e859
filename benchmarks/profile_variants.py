"""Variants of a calibrated profile, to tell what its choices are worth, on SmolLM2; and how stable they are.

    python benchmarks/profile_variants.py --text FILE... --tokens 4096 --target-live 0.2 --work DIR --out DIR
        [--plot PNG]

writes profiles into a directory, to be read by `benchmarks/profile_table.py`, all of about the same size: calibrated;
with the same choices dealt to heads at random; without the second reading; by that alone; with the paper's threshold
for all heads; and the heads that a second reading needs most kept whole, the rest alike. Prints which heads those are,
and how much of it each text says alike.
"""

import argparse
from pathlib import Path

import numpy as np

import corm_jax as cj
from corm_jax.files import make_directory
from corm_jax.inputs import encode, read_text
from simulator import calibrate
from simulator.calibrate import CHOICES, RETURNS, choose

MOST = 12
"""Heads that are printed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 files")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--target-live", type=float, default=0.2)
    parser.add_argument("--work", type=Path, required=True, help="as for corm calibrate")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    make_directory(arguments.work)
    make_directory(arguments.out)
    model, tokenizer = cj.load()
    names = [str(path) for path in arguments.text]
    texts = {name: encode(model, tokenizer, read_text(Path(name)), name, arguments.tokens) for name in names}
    each = calibrate.costs(model, texts, work=arguments.work)
    cost, target = calibrate.mean(each), arguments.target_live
    gain = np.maximum(cost.again, 0)

    def save(name: str, choice: np.ndarray) -> None:
        calibrate.profile("smollm2-135m", choice, cost, {"variant": name}).save(arguments.out / f"{name}.json")

    calibrated = choose(cost.live, cost.blurred + RETURNS * gain, target)
    save("calibrated", calibrated)
    for seed in (0, 1):
        save(f"dealt-{seed}", np.random.default_rng(seed).permutation(calibrated.reshape(-1)).reshape(calibrated.shape))
    save("without-second-reading", choose(cost.live, cost.blurred, target))
    save("second-reading-alone", choose(cost.live, gain, target))
    paper = [place for place, (_, _, multiple) in enumerate(CHOICES) if multiple == 1]
    save("paper-threshold", np.array(paper)[choose(cost.live[paper], (cost.blurred + RETURNS * gain)[paper], target)])
    order = np.argsort(-gain[0].reshape(-1), kind="stable")
    for whole in (0, 3, 6, 9, 12):
        save(f"whole-{whole}", alike(cost.live, order[:whole], target))

    print("| layer | head | second reading, nats | (w, r, m) | live |")
    print("|---|---|---|---|---|")
    for place in order[:MOST]:
        at = np.unravel_index(place, calibrated.shape)
        window, recent, multiple = CHOICES[calibrated[at]]
        chosen = "all" if window is None else f"{window}, {recent}, {multiple}"
        print(f"| {at[0]} | {at[1]} | {gain[0][at]:.3f} | {chosen} | {cost.live[calibrated[at]][at]:.2f} |")
    print(f"\nAll heads: {gain[0].sum():.2f} nats; these {MOST}: {gain[0].reshape(-1)[order[:MOST]].sum():.2f}.\n")
    print("| texts | second reading: correlation | the same of the first 9 | live: correlation | the same (w, r, m) |")
    print("|---|---|---|---|---|")
    for one in range(len(each)):
        for other in range(one):
            print(
                f"| {Path(names[other]).name}, {Path(names[one]).name} | {alikeness(each[other], each[one], target)} |"
            )
    if arguments.plot:
        draw(np.take_along_axis(cost.live, calibrated[None], axis=0)[0], gain[0], arguments.plot)


def alike(live: np.ndarray, whole: np.ndarray, target: float) -> np.ndarray:
    """These heads keep everything, the others have one (w, r, m) in common, which comes next to the target."""
    chosen = np.zeros((len(CHOICES), *live.shape[1:]), int) + np.arange(len(CHOICES))[:, None, None]
    chosen.reshape(len(CHOICES), -1)[:, whole] = len(CHOICES) - 1
    size = np.take_along_axis(live, chosen, axis=0).mean((1, 2))
    return chosen[np.abs(size - target).argmin()]


def alikeness(one: calibrate.Cost, other: calibrate.Cost, target: float) -> str:
    """How much two texts say alike."""
    gains = [np.maximum(cost.again[0], 0).reshape(-1) for cost in (one, other)]
    first = [set(np.argsort(-gain)[:9]) for gain in gains]
    choices = [choose(cost.live, cost.blurred + RETURNS * np.maximum(cost.again, 0), target) for cost in (one, other)]
    lives = [
        np.take_along_axis(cost.live, choice[None], axis=0).reshape(-1)
        for cost, choice in zip((one, other), choices, strict=True)
    ]
    same = np.mean(choices[0] == choices[1])
    return " | ".join(
        [
            f"{np.corrcoef(gains)[0, 1]:.2f}",
            f"{len(first[0] & first[1])}",
            f"{np.corrcoef(lives)[0, 1]:.2f}",
            f"{same:.2f}",
        ]
    )


def draw(live: np.ndarray, gain: np.ndarray, path: Path) -> None:
    """What each head keeps, and what a second reading gains from it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(2, 1, figsize=(11, 3.6), layout="constrained", sharex=True)
    for axes, values, title in zip(
        both,
        (live, gain),
        ("live share of the keys", "what a second reading loses without it, nats a token"),
        strict=True,
    ):
        picture = axes.imshow(values.T, aspect="auto", cmap="viridis")
        axes.set(title=title, ylabel="head", yticks=range(values.shape[1]))
        figure.colorbar(picture, ax=axes, pad=0.01)
    both[1].set(xlabel="layer")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
