"""Makes variants of a calibrated profile, which show what its choices are worth, on SmolLM2.

    python benchmarks/profile_variants.py --text FILE... --tokens 4096 --target-live 0.2 --work DIR --out DIR
        [--plot PNG]

The script writes profiles of about the same size into a directory; `benchmarks/profile_table.py` reads them:

- the calibrated profile;
- the same choices, given to heads at random;
- calibrated without the second reading, and by the second reading alone;
- calibrated with the paper's threshold for all heads;
- the heads that the second reading needs most keep everything, and all others have the same (w, r, m), the same (w, r)
  with the paper's threshold, or the same window.

It prints the heads that the second reading needs most.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import corm_jax as cj
from corm_jax.command.inputs import encode
from corm_jax.evaluation import plots
from corm_jax.evaluation.texts import read_text
from corm_jax.files import make_directory
from corm_jax.policies.profile import Profile
from corm_jax.runs import calibrate
from corm_jax.runs.calibrate import CHOICES, choose, chosen
from corm_jax.showing.drawing import saving

MOST = 12
"""How many heads are printed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 files")
    parser.add_argument("--tokens", type=int, default=4096, help="how many tokens of each text to read")
    parser.add_argument("--target-live", type=float, default=0.2, help="share of the keys that a profile keeps")
    parser.add_argument("--work", type=Path, required=True, help="as for corm calibrate")
    parser.add_argument("--out", type=Path, required=True, help="directory for the profiles")
    parser.add_argument("--plot", type=Path, help="draw the heads into this PNG file")
    arguments = parser.parse_args()
    make_directory(arguments.work)
    make_directory(arguments.out)
    model, tokenizer = cj.load()
    texts = {
        str(path): encode(model, tokenizer, read_text(path), str(path), arguments.tokens) for path in arguments.text
    }
    found = calibrate.costs(model, texts, begin=len(tokenizer.begin), work=arguments.work)
    cost, target = calibrate.mean(found), arguments.target_live
    gain = np.maximum(cost.again, 0)

    def save(name: str, choice: np.ndarray) -> None:
        calibrate.profile("smollm2-135m", choice, cost, {"variant": name}).save(arguments.out / f"{name}.json")

    calibrated = choose(cost.live, cost.loss, target)
    save("calibrated", calibrated)
    for seed in (0, 1):
        save(f"dealt-{seed}", np.random.default_rng(seed).permutation(calibrated.reshape(-1)).reshape(calibrated.shape))
    save("without-second-reading", choose(cost.live, cost.blurred, target))
    save("second-reading-alone", choose(cost.live, gain, target))
    paper = [place for place, (_, _, multiple) in enumerate(CHOICES) if multiple == 1]
    save("paper-threshold", np.array(paper)[choose(cost.live[paper], cost.loss[paper], target)])
    order = np.argsort(-gain[0].reshape(-1), kind="stable")
    for whole in (0, 3, 6, 9, 12):
        save(f"whole-{whole}", alike(cost.live, order[:whole], target, range(len(CHOICES) - 1)))
    save("whole-6-paper", alike(cost.live, order[:6], target, paper[:-1]))
    heads = np.isin(np.arange(gain[0].size), order[:6]).reshape(gain[0].shape)
    newest = round((target - heads.mean()) / (1 - heads.mean()) * arguments.tokens) - calibrate.SINKS
    window = [[None if one else 1 for one in layer] for layer in heads]
    recent, never = (np.full(heads.shape, value).tolist() for value in (newest, 2**30))
    numbers: dict[str, Any] = {"window": window, "recent": recent, "multiple": never}
    made = {"variant": "whole-6-window"}
    Profile(model="smollm2-135m", **numbers, sinks=calibrate.SINKS, group=calibrate.GROUP, made=made).save(
        arguments.out / "whole-6-window.json"
    )

    print("| layer | head | second reading, nats | (w, r, m) | live |")
    print("|---|---|---|---|---|")
    for place in order[:MOST]:
        at = np.unravel_index(place, calibrated.shape)
        window, recent, multiple = CHOICES[calibrated[at]]
        what = "all" if window is None else f"{window}, {recent}, {multiple}"
        print(f"| {at[0]} | {at[1]} | {gain[0][at]:.3f} | {what} | {cost.live[calibrated[at]][at]:.2f} |")
    print(
        f"\nSecond reading, sum over all heads: {gain[0].sum():.2f} nats; over these {MOST}: "
        f"{gain[0].reshape(-1)[order[:MOST]].sum():.2f} nats."
    )
    if arguments.plot:
        panels = {"live keys at the end of a text, share": chosen(cost.live, calibrated)}
        panels |= {"what a second reading loses without the head, nats a token": gain[0]}
        saving(plots.heads, panels, "What calibration keeps in each head of smollm2-135m, and why")(arguments.plot)


def alike(live: np.ndarray, whole: np.ndarray, target: float, choices: Sequence[int]) -> np.ndarray:
    """Choices under which these heads keep everything, and all others have the one choice nearest to the target."""
    every = np.zeros((len(choices), *live.shape[1:]), int) + np.array(choices)[:, None, None]
    every.reshape(len(choices), -1)[:, whole] = len(CHOICES) - 1
    size = np.take_along_axis(live, every, axis=0).mean((1, 2))
    return every[np.abs(size - target).argmin()]


if __name__ == "__main__":
    main()
