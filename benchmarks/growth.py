"""How many keys CORM keeps, and how long a token takes, as a text grows from 1,024 tokens on.

    python benchmarks/growth.py --text FILE --plan PLAN [--tokens 32768] [--grow 1.6] [--json FILE]

SmolLM2 reads the text once, in the chunks of the plan, in pools that are `--grow` times as large as those of the plan.
`live` is the live share of all keys; `new` is the live share of the keys that were read since the row above. Then
tokens are decoded from pools with slots for just the live keys, and from full caches of the same text, in turns. Keys
and values are random in this part, since the time depends on shapes only.
"""

import argparse
from pathlib import Path

import numpy as np
from decode_speed import CORM, Contender, race

import corm_jax as cj
from corm_jax.command.inputs import encode, text_from
from corm_jax.files import write_json
from corm_jax.model.generation import STRETCH
from corm_jax.policies.plan import Plan
from corm_jax.runs.perplexity import read_text
from corm_jax.terminal.console import progress_bar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 file")
    parser.add_argument("--plan", type=Path, required=True, help="as python -m simulator plan makes it")
    parser.add_argument("--tokens", type=int, default=32768, help="how many tokens to read")
    parser.add_argument("--grow", type=float, default=1.6, help="size of the pools, as a multiple of the plan's")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each cache")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    arguments = parser.parse_args()
    model, tokenizer = cj.load()
    ids = encode(model, tokenizer, *text_from(arguments.text), arguments.tokens)
    plan = Plan.load(arguments.plan)
    policy, capacity = cj.parse(plan.policy), [int(size * arguments.grow) for size in plan.capacity]
    with progress_bar() as progress:
        task = progress.add_task(plan.policy, total=len(ids))
        reading = read_text(
            model,
            policy,
            ids,
            capacity=capacity,
            stores=1,
            chunk=plan.chunk,
            progress=lambda done: progress.update(task, completed=done),
        )
    at, room = 1024 * 2 ** np.arange(int(np.log2(arguments.tokens / 1024)) + 1), STRETCH * (arguments.rounds + 1)
    heads = model.config.layers * model.config.kv_heads
    live = [int(reading.live[:, np.searchsorted(reading.seen, tokens)].sum()) for tokens in at]
    contenders = {}
    for tokens, keys in zip(at.tolist(), live, strict=True):
        pool = Contender(1, tokens, "pooled", CORM, -(-keys // heads) + room)
        full = Contender(1, tokens, "full", cj.Full(), tokens + room)
        contenders |= {one: one.lower(model).compile() for one in (full, pool)}
    times = race(model, contenders, arguments.rounds)
    seconds = [float(np.median(found) / STRETCH) for found, _ in times.values()]
    overflow = int(reading.usage.overflow.sum())
    print(f"{plan.policy}, chunks of {plan.chunk}; {overflow:,} of {heads * len(ids):,} keys had no free slot\n")
    print("| tokens | NLL | live | new | live keys a head | full: ms a token | pooled: ms a token | faster |")
    print("|---|---|---|---|---|---|---|---|")
    rows, before = [], (0, 0)
    for row, (tokens, keys) in enumerate(zip(at.tolist(), live, strict=True)):
        new = (keys - before[1]) / heads / (tokens - before[0])
        nll = float(reading.nll[before[0] : tokens].mean())
        full, pooled = (1e3 * x for x in seconds[2 * row : 2 * row + 2])
        rows.append({"tokens": tokens, "nll": nll, "live": keys / heads / tokens, "full": full, "pooled": pooled})
        print(
            f"| {tokens:,} | {nll:.3f} | {keys / heads / tokens:.3f} | {new:.3f} | {keys / heads:,.0f} | {full:.1f} "
            f"| {pooled:.1f} | {full / pooled:.2f} |"
        )
        before = tokens, keys
    if arguments.json:
        write_json(arguments.json, {"overflow": overflow, "rows": rows})


if __name__ == "__main__":
    main()
