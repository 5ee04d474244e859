"""``corm compare``: a text is read through the cache of each policy, and the results stand side by side."""

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np

from corm_jax.command import inputs
from corm_jax.command.options import DEFAULT_POLICY, model_options, text_option
from corm_jax.command.sizes import Sizes, cache_options
from corm_jax.core.types import Usage
from corm_jax.errors import CormError
from corm_jax.evaluation import plots
from corm_jax.files import check_new, deliver, finish, write_json
from corm_jax.model.decoder import hidden, windows_of
from corm_jax.model.prompts import scored_from
from corm_jax.policies import keys_of, lacks_window, on_budget, parse
from corm_jax.runs.fitting import PASSES, fitted
from corm_jax.runs.perplexity import Reading, read_text
from corm_jax.showing.drawing import saving
from corm_jax.terminal import console
from corm_jax.terminal.console import COUNT, Budget, Spec, Whole, naming
from corm_jax.terminal.limits import check_matplotlib
from corm_jax.terminal.tables import Column, mib, print_table

KINDS = ("live", "allocated", "full")
DEFAULT_POLICIES = ("full", DEFAULT_POLICY, "corm:window=64,recent=64")


@click.command(cls=console.Command)
@model_options
@cache_options
@text_option
@click.option("--tokens", type=Whole(2), default=2048, show_default=True, help="tokens of the text to read")
@click.option(
    "--policy", "specs", type=Spec(), multiple=True, metavar="SPEC", help="name:option=value,...; repeat to compare"
)
@click.option(
    "--budget",
    type=Budget(),
    metavar="KEYS",
    help="keys of a head that stay at most under each policy but full, or a share of the tokens such as 0.25",
)
@click.option(
    "--prompt",
    type=COUNT,
    help="how many of the tokens are the prompt, which is not scored; for policies that wait for its end",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="write the results into this JSON file")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="draw the results into this PNG file")
@console.overwrite_option
def compare(
    model,
    dtype,
    capacity,
    layout,
    chunk,
    overflow,
    text,
    tokens,
    specs,
    budget,
    prompt,
    json_file,
    plot_file,
    overwrite,
):
    """Read a text through the cache of each policy: how much worse it is predicted, and how much memory is saved.

    Every token is predicted from the keys that the cache still holds (teacher forcing). A SPEC is a name from `corm
    policies` with options, as in corm:window=64,recent=32, or a class of your own, as in my_policies:Recent:budget=64;
    its module is imported, also from the current directory.

    With --budget, corm without a window gets the window with which it holds that many keys when the text ends. It is
    searched by reading the text a few more times. With a window, corm keeps its rule, and the budget is a limit.
    """
    specs = list(dict.fromkeys(specs or DEFAULT_POLICIES))
    keys = None if budget is None else keys_of(budget, tokens)
    sizes = Sizes.of(capacity, layout, chunk, specs, tokens)
    if chunk > tokens:
        raise CormError(f"--chunk {chunk} is more than --tokens {tokens}: lower --chunk")
    searched = [spec for spec in specs if keys and lacks_window(spec)]
    if searched and keys and keys > tokens:
        raise CormError(
            f"--budget {budget} is more than --tokens {tokens}, and {searched[0]} cannot keep more: lower --budget"
        )
    policies = {}
    for spec in specs:
        with naming({"--policy": spec, "--budget": budget}):
            policies[spec] = parse(on_budget(spec, keys) if keys and spec not in searched else spec)
        console.check_prompt(spec, policies[spec], prompt, tokens - 1)
        sizes.check_slots(spec, policies[spec], tokens, chunk, prompt)
    check_new({"--json": json_file, "--plot": plot_file}, overwrite)
    if plot_file:
        check_matplotlib()
    words, name = inputs.text_from(text)
    network, tokenizer = inputs.load(model, dtype)
    sizes.check(model, network.config)
    inputs.check_profiles(specs, model, network)
    for spec, policy in policies.items():
        sizes.check_memory(network, spec, policy, tokens, chunk, "--tokens", prompt)
    ids = inputs.encode(network, tokenizer, words, name, tokens)
    first = scored_from(tokenizer, prompt)
    result = {
        "model": model,
        "text": name,
        "tokens": tokens,
        "prompt": prompt,
        "scored": tokens - first,
        "dtype": hidden(network).dtype.name,
        "device": _device(),
        "chunk": chunk,
        "layout": layout,
        "budget": keys,
        "rows": [],
    }
    if any(windows := windows_of(network.config)):
        result["windows"] = windows
    if keys is None and capacity is None:
        console.note_budgets(specs)
    console.note_small_budgets(specs, tokens, prompt)
    options = {"stores": sizes.stores, "chunk": chunk, "prompt": prompt, "overflow": overflow}
    for spec in specs:
        held = "none"
        if keys:
            with console.progress_bar() as progress:
                task = progress.add_task(f"{spec}: searching the window", total=PASSES, visible=lacks_window(spec))
                advance = partial(progress.update, task)
                spec, held = fitted(
                    spec, network, ids, keys, chunk=chunk, progress=lambda done, to=advance: to(completed=done)
                )
        reading = _read(spec, network, parse(spec), ids, capacity=sizes.of_spec(spec), **options)
        result["rows"].append(_row(spec, reading, first, result["rows"]) | {"budget": held})
    result["peak_memory_bytes"] = _peak_memory()
    steps = [partial(_print_table, result)]
    if plot_file:
        steps.insert(0, partial(deliver, plot_file, saving(plots.compare, result), overwrite))
    if json_file:
        steps.insert(0, partial(deliver, json_file, lambda path: write_json(path, result), overwrite))
    finish(*steps)


def _device() -> str:
    device = jax.devices()[0]
    return f"{device.platform}: {device.device_kind}"


def _peak_memory() -> dict[str, int]:
    """The most bytes in use so far: of the process, if the system says, and of the accelerator, if there is one."""
    peaks = {}
    with contextlib.suppress(ModuleNotFoundError):  # not on Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks["process"] = peak if sys.platform == "darwin" else peak * 1024
    if statistics := jax.devices()[0].memory_stats():
        peaks["device"] = statistics["peak_bytes_in_use"]
    return peaks


def _read(spec: str, *arguments, **options) -> Reading:
    with naming({"--policy": spec}), console.progress_bar() as progress:
        task = progress.add_task(spec, total=len(arguments[-1]))
        return read_text(*arguments, **options, progress=lambda done: progress.update(task, completed=done))


def _row(spec: str, reading: Reading, scored_from: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    nll = float(reading.nll[scored_from - 1 :].mean(dtype=np.float64))
    return {
        "policy": spec,
        "nll": nll,
        "ppl": float(np.exp(nll)),
        "delta_nll": nll - (rows[0]["nll"] if rows else nll),
        "kept_final": float(reading.kept[-1]),
        "kept_mean": float(reading.kept.mean()),
        "kv_bytes_full": reading.usage.bytes_full,
        "kv_bytes_live": reading.usage.bytes_live,
        "kv_bytes_allocated": reading.usage.bytes_allocated,
        "overflow": int(reading.usage.overflow.sum()),
        "passes": reading.passes,
        "seconds": reading.seconds,
        "kept_per_layer": reading.kept_per_layer.tolist(),
    } | _apart(reading.usage)


def _apart(usage: Usage) -> dict[str, Any]:
    """The bytes of global and local layers, if there are local ones."""
    if usage.local is None:
        return {}
    return {f"kv_bytes_{kind}": part._asdict() for kind, part in (("global", usage.of_global), ("local", usage.local))}


def _print_table(result: dict[str, Any]) -> None:
    budget = result["budget"]
    columns = [Column("policy"), *([Column("budget")] if budget else [])]
    headings = "NLL", "PPL", "Δ NLL", "kept", "kept\nmean", "live\nMiB", "alloc.\nMiB", "full\nMiB", "over-\nflow", "s"
    columns += [Column(heading, number=True) for heading in headings]

    def sizes(row):
        held = row.get("kv_bytes_global") or {kind: row[f"kv_bytes_{kind}"] for kind in KINDS}
        return [mib(held[kind]) for kind in KINDS]

    rows = [
        (
            row["policy"],
            *([row["budget"]] if budget else []),
            f"{row['nll']:.4f}",
            f"{row['ppl']:.2f}",
            f"{row['delta_nll']:+.4f}",
            f"{row['kept_final']:.3f}",
            f"{row['kept_mean']:.3f}",
            *sizes(row),
            str(row["overflow"]),
            f"{row['seconds']:.1f}",
        )
        for row in result["rows"]
    ]
    local = result["rows"][0].get("kv_bytes_local")
    if local:  # the same for every policy
        empty = [""] * (5 + bool(budget))
        rows.append(("local layers", *empty, *(mib(local[kind]) for kind in KINDS), "", ""))
    peaks = ", ".join(f"{peak / 2**30:.2f} GiB ({where})" for where, peak in result["peak_memory_bytes"].items())
    notes = [
        f"NLL: negative log-likelihood in nats a token, mean over {result['scored']:,} predictions; PPL: exp(NLL); "
        "Δ NLL: difference from the first row. kept: share of the keys that are live, mean over layers and heads, at "
        "the end and over time. MiB of keys and values that are live, of the arrays that are allocated, and of a full "
        "cache. overflow: keys evicted because no slot was free. s: seconds, without compiling.",
        f"{result['dtype']}, chunks of {result['chunk']}, {result['device']}, peak memory {peaks}.",
    ]
    if budget:
        notes.append(
            f"budget: {budget:,} keys of a head. fixed: the policy keeps that many. cap: the policy decides by itself, "
            "and keeps at most that many. searched: CORM's w = r is such that it ends with that many. none: no budget."
        )
    if local:
        windows = [window for window in result["windows"] if window]
        notes.append(
            f"{len(windows)} of {len(result['windows'])} layers are local, with windows of "
            f"{', '.join(map(str, sorted(set(windows))))}: whatever the policy, they hold what these show. Memory and "
            "kept of a policy are those of the other layers."
        )
    print_table(
        columns, rows, title=f"{result['model']} reads {result['tokens']:,} tokens of {result['text']}", notes=notes
    )
