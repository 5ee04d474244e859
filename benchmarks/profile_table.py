"""What policies lose on a text, and of a passage that comes again, on SmolLM2.

    python benchmarks/profile_table.py --text FILE [--tokens 4096] [--passages 5] [--chunk 32] --policy SPEC...
        [--budget SHARE...] [--json FILE] [--plot PNG]

Each reading is a stretch of the file, of so many tokens, and then, once more, the 512 that began 1,536 before its end;
the stretches are spread over the file. On the stretch: the NLL above that of the full cache, in percent; KL(full ||
policy) of the predictions, nats a token; how often both find the same token likeliest. Repeat: the NLL of the second
reading, nats a token, and the share of the gap between a window and the full cache that is closed, where
`streaming_llm` is among the policies, the first of it. Live: the share of the stretch's keys that are live at its end.
`full` comes first.

Policies that can be held to a budget get each `--budget`, a share of the stretch, in turn; CORM and profiles decide by
themselves. With several profiles, each other policy is compared with the largest of them that is no larger. Intervals:
95%, by the bootstrap over stretches. With `--json` every reading is kept, and none is read twice: the same command goes
on after a kill. A profile must have been calibrated on other texts than FILE.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

import corm_jax as cj
from corm_jax.command.inputs import check_profiles
from corm_jax.core.policy import Policy
from corm_jax.errors import CormError
from corm_jax.evaluation import agreement
from corm_jax.evaluation.intervals import bootstrap
from corm_jax.evaluation.texts import read_text
from corm_jax.files import write_json
from corm_jax.model.prompts import Text
from corm_jax.policies import held_by, keys_of, on_budget, profile_of
from corm_jax.showing.drawing import GREY, figure_of, saving, styles, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

AGAIN, BEFORE = 512, 1536
"""Tokens that are read once more, and where they began."""


class Reading(NamedTuple):
    """One number for each stretch.

    Attributes:
      nll, full_nll: of the stretch, through the policy's cache and the full one.
      live: share of the keys that is live where it ends.
      again, full_again: NLL of the second reading.
      kl, same: of the stretch.
    """

    nll: np.ndarray
    full_nll: np.ndarray
    live: np.ndarray
    again: np.ndarray
    full_again: np.ndarray
    kl: np.ndarray
    same: np.ndarray

    @property
    def above(self) -> np.ndarray:
        """NLL above the full cache's, percent."""
        return 100 * (self.nll / self.full_nll - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 file")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=32, help="tokens between evictions")
    parser.add_argument("--policy", nargs="+", required=True, metavar="SPEC")
    parser.add_argument("--budget", nargs="+", default=[], metavar="SHARE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.tokens % arguments.chunk or arguments.tokens < BEFORE:
        parser.error(f"--tokens {arguments.tokens}: must be a multiple of --chunk, and at least {BEFORE}")
    model, tokenizer = cj.load()
    specs = held(arguments.policy, arguments.budget, arguments.tokens)
    check_profiles(specs, "smollm2-135m", model)
    book = Text(tokenizer, read_text(arguments.text), str(arguments.text))
    starts = np.linspace(0, len(book) - arguments.tokens, arguments.passages).astype(int).tolist()
    kept: dict[str, dict[str, dict[str, float]]] = {}
    if arguments.json and arguments.json.exists():
        kept = json.loads(arguments.json.read_text())

    def stored(spec: str, start: int) -> str:
        """Under which name a reading is kept: by what policy and profile are, which a SPEC may name otherwise."""
        policy = [repr(cj.parse(spec)), repr(profile_of(spec))]
        said = [arguments.text.name, start, arguments.tokens, arguments.chunk]
        return f"{' '.join(map(str, said))} {hashlib.sha256(json.dumps(policy).encode()).hexdigest()[:16]}"

    for start in starts:
        missing = [spec for spec in specs if stored(spec, start) not in kept.setdefault(spec, {})]
        if missing:  # one stretch after the other, for the full cache's predictions of one take 0.2 MB a token
            text = again(book.part(arguments.tokens, start))
            predicted = agreement.blocks(model, cj.Full(), text, None, arguments.chunk)
            full = [np.asarray(x.log_probability) for x in predicted]
        for spec in track(missing, f"from token {start:,}", console=Console(stderr=True)):
            kept[spec][stored(spec, start)] = measure(
                model, cj.parse(spec), text, arguments.tokens, arguments.chunk, full
            )
            if arguments.json:
                write_json(arguments.json, kept)

    rows: dict[str, Reading] = {}
    print(f"| {arguments.tokens:,} tokens | live | NLL above full, % | KL | same token | repeat NLL |")
    print("|---|---|---|---|---|---|")
    for spec in specs:
        each = [kept[spec][stored(spec, start)] for start in starts]
        row = rows[spec] = Reading(*(np.array([one[field] for one in each]) for field in Reading._fields))
        cells = map(bootstrap, (row.live, row.above, row.kl, row.same, row.again))
        print(f"| `{spec}` | {' | '.join(map(str, cells))} |", flush=True)
    for spec in [spec for spec in specs if spec.startswith("streaming_llm")][:1]:
        window = rows[spec].again
        print(f"\nOf the gap to `{spec}` in the repeat, closed by\n")
        for other, row in rows.items():
            print(f"- `{other}`: {bootstrap((window - row.again) / (window - row.full_again))}")
    if len([spec for spec in specs if "profile=" in spec]) > 1:
        print(f"\n{frontier(rows)}")
    if arguments.plot:
        saving(draw, rows, arguments.tokens)(arguments.plot)


def again(stretch: Sequence[int]) -> list[int]:
    """A stretch, and what comes again."""
    return [*stretch, *stretch[-BEFORE:][:AGAIN]]


def measure(
    model: cj.Llama, policy: Policy, text: Sequence[int], tokens: int, chunk: int, full: Sequence[np.ndarray]
) -> dict[str, float]:
    """What `Reading` holds, of a stretch of so many tokens and what comes again, given the full cache's predictions."""
    found = agreement.measure(model, policy, text, None, chunk, full=full)
    first, second = slice(tokens - 1), slice(tokens, None)  # not the first of what comes again: it follows a break
    live = found.live[:, tokens // chunk - 1].mean() / tokens
    read = found.nll[first], found.full_nll[first], live, found.nll[second], found.full_nll[second]
    numbers = [float(np.mean(values, dtype=np.float64)) for values in (*read, found.kl[first], found.same[first])]
    if not np.isfinite(numbers).all():
        raise CormError(f"{policy} predicts what is not a number")
    return dict(zip(Reading._fields, numbers, strict=True))


def frontier(rows: dict[str, Reading]) -> str:
    """Every other policy beside the largest profile that is no larger than it, but for a hundredth."""
    table = [
        "| policy | live | profile's | NLL above the profile's, % | KL above | repeat NLL above |",
        "|---|---|---|---|---|---|",
    ]
    profiles = [row for spec, row in rows.items() if "profile=" in spec]
    for spec, row in rows.items():
        smaller = [one for one in profiles if one.live.mean() <= row.live.mean() + 0.01]
        if "profile=" not in spec and spec != "full" and smaller:
            own = max(smaller, key=lambda one: one.live.mean())
            above = map(bootstrap, (row.above - own.above, row.kl - own.kl, row.again - own.again))
            sizes = f"{row.live.mean():.3f} | {own.live.mean():.3f}"
            table.append(f"| `{spec}` | {sizes} | {' | '.join(map(str, above))} |")
    return "\n".join(table)


def held(policies: list[str], budgets: list[str], tokens: int) -> list[str]:
    """The SPECs to be read, `full` first: each at each budget, unless it decides by itself."""
    found = ["full"]
    for spec in policies:
        free = held_by(spec) == "cap" or not budgets or "budget=" in spec
        found += [spec] if free else [on_budget(spec, keys_of(budget, tokens)) for budget in budgets]
    return list(dict.fromkeys(found))


def draw(rows: dict[str, Reading], tokens: int, figure: "Figure | SubFigure | None" = None) -> "Figure | SubFigure":
    """What is lost against the live share, a line for each policy."""
    families: dict[str, list[Reading]] = {}
    for spec, row in rows.items():
        name, _, options = spec.partition(":")
        name += ":profile" if "profile=" in options else ":attention=mean" if "attention=mean" in options else ""
        families.setdefault(name, []).append(row)
    full = families.pop("full")[0]
    figure = figure_of(figure, 13.5, 5.2)
    panels = figure.subplots(1, 3)
    for name, style in styles(families).items():
        points = sorted(families[name], key=lambda row: row.live.mean())
        live = [row.live.mean() for row in points]
        for axes, field in zip(panels, ("above", "kl", "again"), strict=True):
            lost = [getattr(row, field).mean() for row in points]
            style |= {"markersize": 5, "linewidth": 2.5 if "profile" in name else 1.2}
            style |= {"linestyle": ""} if name == "adaptive_corm" else {}  # its readings differ in more than one thing
            axes.plot(live, lost, label=name, **style)
    panels[2].axhline(full.again.mean(), color=GREY, lw=1.2, ls="--", label="full")
    panels[0].set(yscale="log", ylabel="NLL above the full cache (%)", title="Prediction: likelihood of the text")
    panels[1].set(yscale="log", ylabel="KL(full || policy) (nats a token)", title="Prediction: the whole distribution")
    panels[2].set(ylabel="NLL (nats a token)", title=f"Recall: {AGAIN} tokens read a second time")
    for axes in panels:
        axes.set(xlabel="live keys / tokens read")
        axes.grid(alpha=0.3)
    handles, labels = panels[2].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", loc="outside lower center", ncols=6, frameon=False)
    what = (
        f"What each policy loses, by the share of the keys that it keeps: {tokens:,} tokens of a book, lower is better"
    )
    title(figure, 13.5, what)
    return figure


if __name__ == "__main__":
    main()
