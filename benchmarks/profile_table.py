"""How much policies lose on a text, and on a passage that is repeated at its end, on SmolLM2.

    python benchmarks/profile_table.py --text FILE [--tokens 4096] [--passages 5] [--chunk 32] --policy SPEC...
        [--budget SHARE...] [--json FILE] [--plot PNG]

A reading is a passage of the file with `--tokens` tokens, followed by a repeat: 512 tokens that began 1,536 tokens
before the end of the passage. The passages are spread over the file. The columns of the table:

- live: the share of the passage's keys that are live at its end;
- NLL above full: how much the NLL of the passage is above that of the full cache, in percent;
- KL: KL(full || policy) of the predictions in the passage, nats a token;
- same token: how often the policy and the full cache have the same likeliest token in the passage;
- repeat NLL: the NLL of the repeat, nats a token. If `streaming_llm` is among the policies, a list below the table says
  which share of the gap between its first entry and the full cache each policy closes.

The first row is `full`. Policies that take a budget are measured with each `--budget`, a share of the passage; CORM and
profiles have none. With several profiles, a second table compares each other policy with the largest profile that keeps
no more keys. Intervals are 95% intervals, by the bootstrap over passages. With `--json` every reading is stored, and
none is read twice: after an interruption, the same command continues. A profile must have been calibrated on other
texts than FILE.
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
"""How many tokens are repeated, and how many tokens before the end of the passage they begin."""


class Reading(NamedTuple):
    """The measurements of a policy, each with one number for each passage.

    Attributes:
      nll, full_nll: the NLL of the passage, with the policy's cache and with the full one.
      live: the share of the keys that is live at the end of the passage.
      again, full_again: the NLL of the repeat.
      kl, same: KL(full || policy) in the passage, and how often both have the same likeliest token.
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
        """How much the NLL is above that of the full cache, in percent."""
        return 100 * (self.nll / self.full_nll - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 file")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a passage")
    parser.add_argument("--passages", type=int, default=5, help="how many passages to read")
    parser.add_argument("--chunk", type=int, default=32, help="tokens between evictions")
    parser.add_argument("--policy", nargs="+", required=True, metavar="SPEC", help="policies to compare")
    parser.add_argument("--budget", nargs="+", default=[], metavar="SHARE", help="budgets, as shares of the passage")
    parser.add_argument("--json", type=Path, help="store the readings in this file")
    parser.add_argument("--plot", type=Path, help="draw the result into this PNG file")
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
        """The name of a reading in the file: from the policy and its profile, which several SPECs may name."""
        policy = [repr(cj.parse(spec)), repr(profile_of(spec))]
        said = [arguments.text.name, start, arguments.tokens, arguments.chunk]
        return f"{' '.join(map(str, said))} {hashlib.sha256(json.dumps(policy).encode()).hexdigest()[:16]}"

    for start in starts:
        missing = [spec for spec in specs if stored(spec, start) not in kept.setdefault(spec, {})]
        if missing:  # passage by passage, since the predictions of the full cache take 0.2 MB a token
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
        print(f"\nThe share of the gap between `{spec}` and the full cache in the repeat that each policy closes:\n")
        for other, row in rows.items():
            print(f"- `{other}`: {bootstrap((window - row.again) / (window - row.full_again))}")
    if len([spec for spec in specs if "profile=" in spec]) > 1:
        print(f"\n{frontier(rows)}")
    if arguments.plot:
        saving(draw, rows, arguments.tokens)(arguments.plot)


def again(stretch: Sequence[int]) -> list[int]:
    """A passage, followed by its repeat."""
    return [*stretch, *stretch[-BEFORE:][:AGAIN]]


def measure(
    model: cj.Transformer, policy: Policy, text: Sequence[int], tokens: int, chunk: int, full: Sequence[np.ndarray]
) -> dict[str, float]:
    """The numbers of a `Reading` for one passage and its repeat, given the predictions of the full cache."""
    found = agreement.measure(model, policy, text, None, chunk, full=full)
    first, second = (
        slice(tokens - 1),
        slice(tokens, None),
    )  # without the first token of the repeat, which follows a break
    live = found.live[:, tokens // chunk - 1].mean() / tokens
    read = found.nll[first], found.full_nll[first], live, found.nll[second], found.full_nll[second]
    numbers = [float(np.mean(values, dtype=np.float64)) for values in (*read, found.kl[first], found.same[first])]
    if not np.isfinite(numbers).all():
        raise CormError(f"{policy} predicts NaN or an infinite number: report this with the text and the policy")
    return dict(zip(Reading._fields, numbers, strict=True))


def frontier(rows: dict[str, Reading]) -> str:
    """A table of the other policies, each beside the largest profile that keeps no more keys (up to 0.01)."""
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
    """The SPECs to measure, `full` first: each with each budget, if it takes one."""
    found = ["full"]
    for spec in policies:
        free = held_by(spec) == "cap" or not budgets or "budget=" in spec
        found += [spec] if free else [on_budget(spec, keys_of(budget, tokens)) for budget in budgets]
    return list(dict.fromkeys(found))


def draw(rows: dict[str, Reading], tokens: int, figure: "Figure | SubFigure | None" = None) -> "Figure | SubFigure":
    """Draws what is lost against the live share, a line for each policy."""
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
            style |= {"linestyle": ""} if name == "adaptive_corm" else {}  # its settings differ in more than one option
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
