"""The command line: `evergreen run`, and a command for each of its parts.

The outermost layer: it alone may import pipelines. Each command lives in a module of its own and is imported when it is
called, because kfp, torch and feast take seconds to import.
"""

from __future__ import annotations

import importlib
import sys

import click

from evergreen.contracts.errors import EvergreenError

_COMMANDS = {
    "run": "evergreen.cli.run:run",
    "demo": "evergreen.cli.demo:demo",
    "filter": "evergreen.cli.filter:filter_command",
    "features": "evergreen.cli.features:features",
    "stream": "evergreen.cli.stream:stream",
    "train": "evergreen.cli.train:train",
    "policy": "evergreen.cli.policy:policy",
    "compile": "evergreen.cli.compile:compile_pipelines",
    "simulate": "evergreen.cli.simulate:simulate",
    "serve": "evergreen.cli.serve:serve",
    "recommend": "evergreen.cli.recommend:recommend",
    "release": "evergreen.cli.release:release",
    "monitor": "evergreen.cli.monitor:monitor",
    "skew": "evergreen.cli.skew:skew",
}


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="evergreen")
def cli() -> None:
    """A recommender that keeps itself fresh: from a click log to served recommendations."""


def main() -> None:
    """Entry point: errors made for people are printed as one message, without a traceback."""
    try:
        cli()
    except EvergreenError as error:
        click.secho(f"Error: {error}", fg="red", err=True)
        sys.exit(1)
