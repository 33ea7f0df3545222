"""`blockferry config`: what the configuration says, whether it is right, and what to write into other tools' own."""

from __future__ import annotations

import json
from typing import Any

import click

from blockferry.cli.context import Context, json_option
from blockferry.cli.generate import generate
from blockferry.config.check import mistakes_in
from blockferry.config.schema import schema as schema_of_ours
from blockferry.errors import UsageError
from blockferry.manager import mask


@click.group()
def config() -> None:
    """What the configuration says, whether it is right, and what other tools' configurations need."""


config.add_command(generate)


@config.command()
@json_option
@click.pass_obj
def check(context: Context) -> int:
    """Say every mistake in the configuration, with its line; look at what it names in other tools' files.

    Exits with 2 if there is any.

    \b
    Example:
      blockferry --config /etc/blockferry/config.yaml config check
    """
    configuration, found = mistakes_in(context.manager, context.config)
    told = [{"message": each.message, "remedy": each.remedy} for each in found]

    def sentence() -> str:
        if not found:
            counts = f"{len(configuration.volumes)} volumes, {len(configuration.groups)} groups"
            return f"{configuration.file or 'no configuration'}: {counts}, and nothing is wrong"
        return "\n".join(f"{each.message}\n  {each.remedy}" for each in found)

    context.output.result({"version": 1, "file": configuration.file, "mistakes": told}, sentence)
    return UsageError.exit_code if found else 0


@config.command()
@json_option
@click.pass_obj
def show(context: Context) -> None:
    """Say what was understood of the configuration; passwords in URLs are not shown.

    \b
    Example:
      blockferry --config /etc/borgmatic/config.yaml config show
    """
    configuration = context.configuration
    data: dict[str, Any] = {
        "version": 1,
        "file": configuration.file,
        "repository": mask(configuration.repository),
        "volumes": {
            each.name: {"path": each.path, "mount": each.mount, "repository": mask(each.repository)}
            for each in configuration.volumes.values()
        },
        "groups": {
            each.name: each.as_json() | {"repository": mask(each.repository)} for each in configuration.groups.values()
        },
    }

    def lines() -> str:
        said = [f"file: {data['file'] or '-'}", f"repository: {data['repository'] or '-'}"]
        said += [
            f"volume {name}: {each['path']}, to {each['repository'] or '-'}" for name, each in data["volumes"].items()
        ]
        said += [
            f"group {name}: {each['root']}, to {each['repository'] or '-'}" for name, each in data["groups"].items()
        ]
        return "\n".join(said)

    context.output.result(data, lines)


@config.command()
@json_option
@click.pass_obj
def schema(_context: Context) -> None:
    """Print the JSON Schema of the configuration, for an editor to complete and check it by.

    \b
    Example:
      blockferry config schema
    """
    click.echo(json.dumps(schema_of_ours(), indent=1))
