"""What policies lose on a text, and of a passage that comes again, on SmolLM2.

    python benchmarks/profile_table.py --text FILE [--tokens 4096] [--passages 5] [--chunk 32] --policy SPEC...
        [--budget SHARE...] [--json FILE] [--plot PNG]

Each reading is a stretch of the file, of so many tokens, and then, once more, the 512 that began 1,536 before its end;
the stretches are spread over the file. Text: the NLL of the stretch above that of the full cache, in percent. Repeat:
the NLL of the second reading, nats a token, and the share of the gap between a window and the full cache that is
closed, where `streaming_llm` is among the policies. Live: the share of the stretch's keys that is live where it ends.
`full` comes first.

Policies that can be held to a budget get each `--budget`, a share of the stretch, in turn; CORM and profiles decide by
themselves. With several profiles, each other policy is compared with the largest of them that is no larger. Intervals:
95%, by the bootstrap over stretches. With `--json` every reading is kept, and none is read twice: the same command goes
on after a kill. A profile must have been calibrated on other texts than FILE.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np

import corm_jax as cj
from corm_jax import perplexity
from corm_jax.evaluation.intervals import bootstrap
from corm_jax.files import write_json
from corm_jax.inputs import check_profiles, read_text
from corm_jax.policies import keys_of, on_budget, profile_of

AGAIN, BEFORE = 512, 1536
"""Tokens that are read once more, and where they began."""


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
    model, tokenizer = cj.load()
    specs = held(arguments.policy, arguments.budget, arguments.tokens)
    check_profiles(specs, "smollm2-135m", model)
    ids = tokenizer.encode(read_text(arguments.text))
    starts = np.linspace(0, len(ids) - arguments.tokens, arguments.passages).astype(int).tolist()
    kept: dict[str, dict[str, list[float]]] = {}
    if arguments.json and arguments.json.exists():
        kept = json.loads(arguments.json.read_text())

    def read(spec: str, start: int) -> list[float]:
        """NLL of the stretch, share live where it ends, NLL of the second reading."""
        key = f"{arguments.text.name} {start} {arguments.tokens} {arguments.chunk}"
        if profile := profile_of(spec):  # by what it says: a file of that name may change
            key += f" {hashlib.sha256(repr(profile).encode()).hexdigest()[:16]}"
        if key not in kept.setdefault(spec, {}):
            stretch = ids[start : start + arguments.tokens]
            found = perplexity.read(
                model, cj.parse(spec), [*stretch, *stretch[-BEFORE:][:AGAIN]], chunk=arguments.chunk
            )
            end = arguments.tokens - 1
            live = found.kept[arguments.tokens // arguments.chunk - 1]
            kept[spec][key] = [float(found.nll[:end].mean()), float(live), float(found.nll[end + 1 :].mean())]
            if arguments.json:
                write_json(arguments.json, kept)
        return kept[spec][key]

    rows = []
    print(f"| {arguments.tokens:,} tokens | live | NLL above full, % | repeat NLL |")
    print("|---|---|---|---|")
    for spec in specs:
        nll, live, again = np.array([read(spec, start) for start in starts]).T
        full = nll if not rows else rows[0][1]
        above = bootstrap(100 * (nll / full - 1))
        rows.append((spec, nll, live, again))
        print(f"| `{spec}` | {bootstrap(live)} | {above} | {bootstrap(again)} |", flush=True)
    for spec, _, _, window in rows:
        if spec.startswith("streaming_llm"):
            print(f"\nOf the gap to `{spec}` in the repeat, closed by\n")
            for other, _, _, again in rows:
                print(f"- `{other}`: {bootstrap((window - again) / (window - rows[0][3]))}")
    if len([spec for spec in specs if "profile=" in spec]) > 1:
        print(f"\n{frontier(rows)}")
    if arguments.plot:
        draw(rows, arguments)


def frontier(rows: list) -> str:
    """Every other policy beside the largest profile that is no larger than it, but for a hundredth."""
    full = rows[0][1]
    table = [
        "| policy | live | profile's | NLL above the profile's, % | repeat NLL above the profile's |",
        "|---|---|---|---|---|",
    ]
    profiles = [row for row in rows if "profile=" in row[0]]
    for spec, nll, live, again in rows[1:]:
        smaller = [row for row in profiles if row[2].mean() <= live.mean() + 0.01]
        if "profile=" not in spec and smaller:
            _, own, size, second = max(smaller, key=lambda row: row[2].mean())
            above, later = bootstrap(100 * (nll - own) / full), bootstrap(again - second)
            table.append(f"| `{spec}` | {live.mean():.3f} | {size.mean():.3f} | {above} | {later} |")
    return "\n".join(table)


def held(policies: list[str], budgets: list[str], tokens: int) -> list[str]:
    """The SPECs to be read, `full` first: each at each budget, unless it decides by itself."""
    found = ["full"]
    for spec in policies:
        free = spec.startswith("corm") or not budgets or "budget=" in spec
        found += [spec] if free else [on_budget(spec, keys_of(budget, tokens)) for budget in budgets]
    return list(dict.fromkeys(found))


def draw(rows: list, arguments: argparse.Namespace) -> None:
    """Both losses against the live share, a line for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families: dict[str, list] = {}
    for spec, nll, live, again in rows[1:]:
        name, _, options = spec.partition(":")
        name += ":profile" if "profile=" in options else ":score=mean" if "score=mean" in options else ""
        families.setdefault(name, []).append((live.mean(), 100 * np.mean(nll / rows[0][1] - 1), again.mean()))
    figure, both = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, points in families.items():
        for axes, column in zip(both, (1, 2), strict=True):
            points = sorted(points)
            wide = 2.5 if "profile" in name else 1.2
            axes.plot(
                [point[0] for point in points], [point[column] for point in points], "o-", ms=4, lw=wide, label=name
            )
    both[1].axhline(rows[0][3].mean(), color="black", lw=0.8, ls="--", label="full")
    both[0].set(yscale="log", ylabel="NLL above the full cache, %", title=f"{arguments.tokens:,} tokens of a book")
    both[1].set(ylabel="NLL, nats a token", title=f"{AGAIN} of them, read again")
    for axes in both:
        axes.set(xlabel="live share of the keys")
        axes.grid(alpha=0.3)
    both[1].legend(fontsize=8)
    figure.savefig(arguments.plot, dpi=110)


if __name__ == "__main__":
    main()
