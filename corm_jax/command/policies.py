"""``corm policies``: a table of the policies and their options."""

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

    Listed are the policies of corm-jax and those of installed packages that register a class as an entry point in the
    group corm_jax.policies. A policy of your own needs no entry point: name it as module:Class, and the module is
    imported, from the current directory or from where it is installed.
    """
    rows = [row for name in (*POLICIES, *registered()) for row in _rows(name)]
    rows.append(("every policy", "", "", "also takes these options, unless it has one of the same name itself"))
    rows += [("", name, "none", meaning) for name, meaning in COMBINATORS.items()]
    print_table([Column(name) for name in ("policy", "option", "default", "what it does")], rows)


def _rows(name: str) -> list[tuple[str, str, str, str]]:
    """A row for a policy, and a row for each of its options."""
    try:
        kind = class_of(name)
    except CormError as error:  # in an installed package: the other policies are listed anyway
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
