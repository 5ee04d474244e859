"""How many kernels each layer launches when a token is decoded, which is what decoding costs on a GPU.

    python benchmarks/launches.py [--policy SPEC ...] [--capacity SLOTS]

The script compiles `corm_jax.decode` for one layer and for two, in the shape of SmolLM2, and counts how many
instructions the second layer adds to the loop over tokens. It counts instructions of the compiled program that run by
themselves, such as a fusion, a product or a copy, but not those that only refer to an array. `loops`, `sorts`,
`branches` and `gathers` are among them; a straight-line step has none of the first three. The seconds are those of
lowering and compiling two layers.
"""

import argparse
import re
import time
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import corm_jax as cj

POLICIES = [
    "full",
    "corm:window=256,recent=256,group=mean",
    "h2o:recent=256,budget=512",
    "tova:budget=512",
    "scissorhands:budget=512",
    "snapkv:budget=512",
    "streaming_llm:budget=512",
]
NAMES = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota"}
"""Instructions that launch nothing."""

STEPS = 16


def compiled(spec: str, stores: int | None, layers: int, capacity: int, **options: bool) -> str:
    """The program that decodes, as XLA's text."""
    shape = {"vocab": 512, "dim": 576, "hidden": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64}
    model = jax.eval_shape(lambda: cj.Transformer(cj.Config(layers=layers, **shape), rngs=nnx.Rngs(0)))
    policy = cj.parse(spec)

    def caches():
        made = cj.make_caches(model, policy, batch=1, capacity=capacity, stores=stores)
        return cj.end_prompt(cj.begin_prompt(made, 1))

    numbers = np.int32(STEPS), np.zeros(0, np.int32), np.float32(0), np.float32(1)
    arguments = jnp.zeros((1, shape["vocab"])), jax.random.key(0), jnp.zeros(1, bool), *numbers
    lowered = cj.decode.lower(model, policy, jax.eval_shape(caches), *arguments, steps=STEPS)
    return lowered.compile(options).as_text()


def launches(program: str) -> Counter:
    """What the loop over tokens launches, by the name of the instruction, also in loops and branches inside it."""
    parts: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in program.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = found[1]
            parts[name] = []
        elif found := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = .*? ([\w\-]+)\((.*)$", line):
            parts[name].append((found[1], found[2]))

    def inside(name: str) -> Counter:
        count = Counter()
        for instruction, rest in parts[name]:
            if instruction not in NAMES:
                count[instruction] += 1
                for called in re.findall(r"(?:body|to_apply|(?:true|false)_computation)=%?([\w.\-]+)", rest):
                    if instruction in ("while", "call", "conditional"):
                        count += inside(called)
                for several in re.findall(r"branch_computations=\{([^}]*)\}", rest):
                    for called in several.split(","):
                        count += inside(called.strip().lstrip("%"))
        return count

    loops = [found[1] for part in parts.values() for kind, rest in part
             if kind == "while" and (found := re.search(r"body=%?([\w.\-]+)", rest))]  # fmt: skip
    return max(
        (inside(body) for body in loops), key=Counter.total
    )  # the loop over tokens; another loop draws random numbers


def of_a_layer(spec: str, stores: int | None, capacity: int = 1024) -> Counter:
    """The instructions that one layer adds."""
    one, two = (launches(compiled(spec, stores, layers, capacity)) for layers in (1, 2))
    return two - one


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", nargs="*", default=POLICIES, metavar="SPEC", help="default: seven of them")
    parser.add_argument("--capacity", type=int, default=1024, help="slots of each head")
    given = parser.parse_args()
    print("| policy | layout | launches a layer | loops | sorts | branches | gathers | s to compile two layers |")
    print("|---|---|---|---|---|---|---|---|")
    for spec in given.policy:
        for layout, stores in (("rectangle", None), ("pool", 1)):
            count = of_a_layer(spec, stores, given.capacity)
            started = time.perf_counter()
            jax.clear_caches()
            partial(compiled, spec, stores, 2, given.capacity)()
            seconds = time.perf_counter() - started
            kinds = [count[kind] for kind in ("while", "sort", "conditional", "gather")]
            print(
                f"| `{spec}` | {layout} | {count.total()} | {' | '.join(map(str, kinds))} | {seconds:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
