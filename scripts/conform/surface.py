"""What the SDK offers, found by looking: public methods of its clients and commands of its command line.

A new SDK's methods appear here by themselves, and without a check in the table as missing.
"""

from __future__ import annotations

import inspect

import click
import tinker
from tinker.cli.__main__ import main_cli

CLIENTS = (
    tinker.ServiceClient,
    tinker.TrainingClient,
    tinker.SamplingClient,
    tinker.RestClient,
    tinker.AdminClient,
)
ASYNC = "_async"


def methods() -> list[str]:
    """ "Client.method" of every public method, in the order of the clients."""
    return [f"{client.__name__}.{name}" for client in CLIENTS for name, _ in _members(client)]


def commands() -> list[str]:
    """ "tinker group command" of every command."""
    return sorted(_leaves(main_cli, click.Context(main_cli), "tinker"))


def _members(client: type) -> list[tuple[str, object]]:
    return [(name, member) for name, member in inspect.getmembers(client) if not name.startswith("_")]


def _leaves(group: click.Command, context: click.Context, prefix: str) -> list[str]:
    if not isinstance(group, click.Group):
        return [prefix]
    leaves: list[str] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        leaves += _leaves(command, context, f"{prefix} {name}")
    return leaves
