"""``corm policies``: what there is to choose from."""

import dataclasses

import click

from corm_jax.errors import CormError
from corm_jax.policies import COMBINATORS, POLICIES
from corm_jax.policies.registry import class_of, registered
from corm_jax.terminal import console
from corm_jax.terminal.tables import Column, print_table


@click.command(cls=console.Command)
def policies():
    """List the policies with their options.

    These are ours and those of installed packages, which register a class as an entry point in the group
    corm_jax.policies. A policy of your own needs no entry point: a SPEC names it as module:Class, and imports the
    module from the current directory, or from wherever it is installed.
    """
    rows = [row for name in (*POLICIES, *registered()) for row in _rows(name)]
    rows.append(("any of them", "", "", "unless it has an option of that name itself"))
    rows += [("", name, "none", meaning) for name, meaning in COMBINATORS.items()]
    print_table([Column(name) for name in ("policy", "option", "default", "what it does")], rows)


def _rows(name: str) -> list[tuple[str, str, str, str]]:
    """A row for a policy and one for each of its options."""
    try:
        kind = class_of(name)
    except CormError as error:  # of a package that is installed: the others are listed all the same
        return [(name, "", "", str(error))]
    words = (kind.__doc__ or "").strip() or name
    needs = ""
    if name in POLICIES:
        needs = f" Needs: {' and '.join(kind().traits.needs) or 'positions only'}."
    rows = [(name, "", "", words.splitlines()[0] + needs)]
    for field in dataclasses.fields(kind):
        choices = field.metadata.get("choices")
        default = "none" if field.default is dataclasses.MISSING else str(field.default).lower()
        rows.append(("", field.name, " | ".join(choices) if choices else default, field.metadata.get("help", "")))
    return rows
