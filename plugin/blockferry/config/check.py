"""All the mistakes in a configuration, each with its place, before a backup meets the first of them."""

from __future__ import annotations

import os

import pluggy

from blockferry.config import autorestic, borgmatic, resticprofile
from blockferry.config.configuration import Configuration, load_configuration
from blockferry.config.reference import ForeignReference
from blockferry.config.section import ConfigurationError
from blockferry.errors import BlockferryError, UsageError
from blockferry.manager import mask


def mistakes_in(manager: pluggy.PluginManager, named: str | None) -> tuple[Configuration, list[BlockferryError]]:
    """Return what a configuration says, as far as it can be read, and what is wrong with it.

    Looked at are the file and what its references name in files of other tools; no repository is opened.
    """
    try:
        configuration = load_configuration(manager, named)
    except ConfigurationError as error:
        return Configuration(), [error, *error.others]
    except UsageError as error:
        return Configuration(), [error]
    found: list[BlockferryError] = []
    checked: dict[str, BlockferryError | None] = {}
    for keys, reference in _references(configuration):
        if reference not in checked:
            checked[reference] = _wrong(reference)
            if wrong := checked[reference]:
                where = configuration.below(*keys[:-1])(keys[-1]) if configuration.below else ".".join(keys)
                found.append(UsageError(f"{where}: {wrong.message}", remedy=wrong.remedy))
    return configuration, found


def _references(configuration: Configuration) -> list[tuple[tuple[str, ...], str]]:
    """Return the references of a configuration, with the keys down to each."""
    found: list[tuple[tuple[str, ...], str]] = [(("repository",), configuration.repository)]
    found += [(("volumes", each.name, "repository"), each.repository) for each in configuration.volumes.values()]
    found += [(("groups", each.name, "repository"), each.repository) for each in configuration.groups.values()]
    return [(keys, reference) for keys, reference in found if reference]


def _wrong(reference: str) -> BlockferryError | None:
    """Return what is wrong with a reference, None if nothing is that can be seen from here."""
    if ":" not in reference:
        return UsageError(
            f"{mask(reference)}: not a repository reference", remedy="Write borg:PATH-OR-URL or restic:PATH-OR-URL."
        )
    try:
        named = ForeignReference.parse(reference)
        if named and named.tool == borgmatic.Borgmatic.tool:
            borgmatic.choose(named, borgmatic.show(named.file))
        elif named and named.tool == resticprofile.Resticprofile.tool:
            resticprofile.profile_of(named).environment(os.environ)
        elif named:
            autorestic.backend_of(named).environment(os.environ)
    except BlockferryError as error:
        return error
    return None
