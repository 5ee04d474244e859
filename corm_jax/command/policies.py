"""``corm policies``: what there is to choose from."""

import dataclasses

import click

from corm_jax.policies import COMBINATORS, POLICIES
from corm_jax.terminal import console
from corm_jax.terminal.tables import Column, print_table


@click.command(cls=console.Command)
def policies():
    """List the policies with their options."""
    rows = []
    for name, kind in POLICIES.items():
        looks = " and ".join(kind().traits.needs) or "positions only"
        rows.append((name, "", "", f"{str(kind.__doc__).splitlines()[0]} Needs: {looks}."))
        for field in dataclasses.fields(kind):
            choices = field.metadata.get("choices")
            value = " | ".join(choices) if choices else str(field.default).lower()
            rows.append(("", field.name, value, field.metadata["help"]))
    rows.append(("any of them", "", "", "unless it has an option of that name itself"))
    rows += [("", name, "none", meaning) for name, meaning in COMBINATORS.items()]
    print_table([Column(name) for name in ("policy", "option", "default", "what it does")], rows)
