"""``corm generate``: a prompt, continued through an evicting cache."""

from pathlib import Path

import click

from corm_jax.command import inputs
from corm_jax.command.options import DEFAULT_POLICY, model_options
from corm_jax.command.sizes import Sizes, cache_options
from corm_jax.core.cache import usage
from corm_jax.core.types import Bytes
from corm_jax.errors import CormError
from corm_jax.evaluation.texts import read_text
from corm_jax.model.generation import stream
from corm_jax.model.prompts import Text
from corm_jax.policies import parse
from corm_jax.terminal import console
from corm_jax.terminal.console import COUNT, SEED, Real, Spec, naming
from corm_jax.terminal.tables import mib

COLDEST = 0.001
"""The lowest temperature above 0: logits that are divided by a smaller number may be too large for float32."""


@click.command(cls=console.Command)
@model_options
@cache_options
@click.option("--prompt", help="the text of the prompt")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="a UTF-8 file with the prompt")
@click.option("--chat", is_flag=True, help="wrap the prompt as a user's turn, by the model's chat template")
@click.option(
    "--policy",
    "spec",
    type=Spec(),
    default=DEFAULT_POLICY,
    show_default=True,
    metavar="SPEC",
    help="name:option=value,...",
)
@click.option("--max-new-tokens", type=COUNT, default=128, show_default=True, help="the most tokens to generate")
@click.option("--temperature", type=Real(0, 1e6), default=0.0, show_default=True, help="0 takes the likeliest token")
@click.option(
    "--top-p",
    type=Real(1e-6, 1),
    default=1.0,
    show_default=True,
    help="draw from the likeliest tokens, up to this total probability",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="of the tokens that are drawn")
def generate(
    model,
    dtype,
    capacity,
    layout,
    chunk,
    overflow,
    prompt,
    prompt_file,
    chat,
    spec,
    max_new_tokens,
    temperature,
    top_p,
    seed,
):
    """Continue a prompt through an evicting cache. The last line that is printed says how full the cache is."""
    policy = parse(spec)
    if (prompt is None) == (prompt_file is None):
        raise CormError("give a prompt, either with --prompt or with --prompt-file")
    if 0 < temperature < COLDEST:
        raise CormError(
            f"--temperature must be 0 or at least {COLDEST}, not {temperature}: 0 takes the likeliest token"
        )
    words = read_text(prompt_file) if prompt is None else prompt
    if not words:
        raise CormError("the prompt is empty: give some words")
    sizes = Sizes.of(capacity, layout, chunk, [spec], None)
    about = {"--policy": spec, "--capacity": capacity}
    sizes.check_slots(spec, policy, 1, chunk)
    network, tokenizer = inputs.load(model, dtype)
    sizes.check(model, network.config)
    inputs.check_profiles([spec], model, network)
    ids = tokenizer.chat(words) if chat else Text(tokenizer, words, "the prompt").whole
    chunk = min(chunk, max(len(ids), 1))  # a larger chunk gives the same result, and takes more memory
    sizes.check_memory(network, spec, policy, len(ids) + max_new_tokens, chunk, "--max-new-tokens")
    inputs.note_context(network, len(ids) + max_new_tokens)
    if capacity is None:
        console.note_budgets([spec])
    console.note_small_budgets([spec], len(ids) + max_new_tokens, len(ids))
    pieces, final = tokenizer.stream(), None
    with naming(about):
        for new in stream(
            network,
            policy,
            [ids],
            max_new_tokens=max_new_tokens,
            capacity=sizes.of_spec(spec),
            stores=sizes.stores,
            chunk=chunk,
            overflow=overflow,
            end=tokenizer.end,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        ):
            for piece in pieces.push(new.tokens[0]):
                print(piece, end="", flush=True)
            final = usage(new.caches)  # before the next tokens, to which the caches are donated
    if final:
        seen, local = int(final.seen[0]), "" if final.local is None else f"; local layers: {_sizes(final.local)}"
        print(
            f"\n[cache: {final.kept * seen:.1f} of {seen} keys live in a head (mean over layers and heads), "
            f"{_sizes(final.of_global)}, overflow {int(final.overflow.sum())}{local}]"
        )


def _sizes(held: Bytes) -> str:
    return ", ".join(f"{mib(getattr(held, kind))} MiB {kind}" for kind in ("live", "allocated", "full"))
