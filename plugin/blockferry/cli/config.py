"""`blockferry config`: what a configuration says, and what is to be written into other tools' own."""

from __future__ import annotations

import click

from blockferry.cli.generate import generate


@click.group()
def config() -> None:
    """The configuration, and what other tools' configurations need."""


config.add_command(generate)
