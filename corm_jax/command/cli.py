"""``corm``: a command line whose commands are plug-ins, of this package and of any other that is installed.

A command is a click command. A package registers it in its ``pyproject.toml``, by the name that the user types:

    [project.entry-points."corm_jax.commands"]
    compare = "corm_jax.command.compare:compare"

It is imported when it is called, or when the help lists it.
"""

from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import NoReturn

from corm_jax.errors import CormError
from corm_jax.terminal import console

# isort: split
import click  # after the console, which says how to install it

GROUP = "corm_jax.commands"
"""The group of entry points that are commands."""


def main() -> NoReturn:
    """Runs the command line."""
    console.run(corm, "corm")


class Plugins(console.Group):
    """The commands that are registered."""

    @cached_property
    def registered(self) -> list[EntryPoint]:
        """The entry points of all commands, read once.

        Raises:
          CormError: if there is none.
        """
        if found := list(entry_points(group=GROUP)):
            return found
        raise CormError(
            "no command is registered: run pip install for corm-jax once more (in a clone, pip install -e .)"
        )

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands, sorted."""
        return sorted({plugin.name for plugin in self.registered})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command with this name, or None if there is none.

        Raises:
          CormError: if two packages have a command with this name, or if it cannot be imported.
        """
        found = [plugin for plugin in self.registered if plugin.name == cmd_name]
        if len(found) > 1:
            places = " and ".join(plugin.value for plugin in found)
            raise CormError(f"two commands are called {cmd_name!r}, {places}: uninstall the package of one of them")
        return _load(found[0]) if found else None


def _load(plugin: EntryPoint) -> click.Command:
    try:
        return plugin.load()
    except (ImportError, AttributeError) as error:
        raise CormError(
            f"the command {plugin.name!r} cannot be imported from {plugin.value}: {error}: install its package once "
            "more, with all that it needs, or uninstall it"
        ) from error


@click.group(cls=Plugins, context_settings=console.SETTINGS)
@console.version_option
def corm():
    """Read and generate text through evicting key-value caches."""
