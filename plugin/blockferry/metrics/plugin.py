"""The plugin that is told of backups and restores, and notes their figures for whoever watches this host.

The directory is what BLOCKFERRY_METRICS_DIR names, else `metrics` in the configuration; without either nothing is
noted. Whatever goes wrong here is a warning: it never fails a backup.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pluggy

from blockferry.errors import NotNowError
from blockferry.hookspecs import hookimpl
from blockferry.manager import without_credentials
from blockferry.metrics.families import FAMILIES
from blockferry.metrics.textfile import Samples, changing, key
from blockferry.repository import EXPORTED
from blockferry.snapshot import Record, Snapshot, Tier

log = logging.getLogger(__name__)

_OF_BACKUPS = {
    "seconds": "backup_duration_seconds",
    "bytes_volume": "backup_volume_bytes",
    "bytes_used": "backup_used_bytes",
    "bytes_changed": "backup_changed_bytes",
    "bytes_read": "backup_read_bytes",
    "bytes_stored": "backup_stored_bytes",
    "problems": "backup_problem_files",
    "hosts": "cluster_hosts",
    "shares": "cluster_shares",
    "bytes_logged": "cluster_logged_bytes",
    "seconds_held": "cluster_held_seconds",
}
"""Figures that `backup --json` or `cluster backup --json` prints, and the metrics that they become."""
_OF_RESTORES = {"seconds": "restore_duration_seconds", "bytes_written": "restore_written_bytes"}
_OF_HOT_RESTORES = {
    "total": "hot_total_bytes",
    "hydrated": "hot_hydrated_bytes",
    "dirty": "hot_dirty_bytes",
    "finished": "hot_complete",
}


class Metrics:
    """The hooks. `manager` is asked for the configuration when something is to be noted."""

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self.manager = manager

    @hookimpl
    def blockferry_snapshot_stored(self, snapshot: Snapshot, record: Record, statistics: dict[str, Any]) -> None:
        """Note a backup that went well."""
        labels = (snapshot.volume, without_credentials(str(statistics.get("repository", ""))))
        figures = statistics | {
            "tier": record.tier.value,
            "tracker": record.tracker,
            "tracker_ready": bool(record.checkpoints),
        }
        self._change(lambda samples: _succeeded(samples, labels, figures))

    @hookimpl
    def blockferry_backup_failed(self, volume: str, repository: str, error: BaseException) -> None:
        """Note a backup that failed; one that is only to be tried again later did not."""
        labels = (volume, without_credentials(repository))
        if not isinstance(error, NotNowError):
            self._change(lambda samples: _failed(samples, labels))

    @hookimpl
    def blockferry_export_released(self, statistics: dict[str, Any], failed: bool) -> None:
        """Note each volume and group of a job: that it went well, as far as is known here, or failed."""

        def change(samples: Samples) -> None:
            for each in statistics["volumes"]:
                labels = (each["name"], EXPORTED)
                if failed or statistics["failure"]:
                    _failed(samples, labels)
                else:
                    _succeeded(samples, labels, each | {"seconds": statistics["seconds"]})

        self._change(change)

    @hookimpl
    def blockferry_restore_progress(self, statistics: dict[str, Any], ended: bool) -> None:
        """Note how far a hot restore is, and forget it when it ends."""
        labels = (str(statistics["name"]),)

        def change(samples: Samples) -> None:
            for name in [each for each in FAMILIES if each.startswith("blockferry_hot_")]:
                samples.pop(key(name, labels), None)
            if ended:
                return
            _put(samples, labels, statistics, _OF_HOT_RESTORES)
            _set(samples, "hot_updated_timestamp_seconds", labels, time.time())
            _set(samples, "hot_failing", labels, bool(statistics.get("failure")))
            _set(samples, "hot_repository_reachable", labels, statistics.get("repository") == "reachable")
            unreadable = sum(length for _start, length in statistics.get("unreadable", []))
            _set(samples, "hot_unreadable_bytes", labels, unreadable)

        self._change(change)

    @hookimpl
    def blockferry_restore_finished(self, snapshot: Snapshot, statistics: dict[str, Any]) -> None:
        """Note a restore that is complete: a hot one has brought in all that there was."""
        figures = {"bytes_written": statistics.get("hydrated", 0), **statistics}

        def change(samples: Samples) -> None:
            _put(samples, (snapshot.volume,), figures, _OF_RESTORES)
            _set(samples, "restore_last_success_timestamp_seconds", (snapshot.volume,), time.time())

        self._change(change)

    def _change(self, change: Callable[[Samples], None]) -> None:
        """Change the samples in the file, if there is to be one; a failure is a warning."""
        try:
            directory = self._directory()
            if directory:
                with changing(directory) as samples:
                    change(samples)
        except Exception as error:
            log.warning("metrics are not written: %s", error)

    def _directory(self) -> Path | None:
        named = os.environ.get("BLOCKFERRY_METRICS_DIR")
        if not named:
            from blockferry.config.configuration import load_configuration  # noqa: PLC0415  # knows groups and more

            named = load_configuration(self.manager).metrics
        return Path(named) if named else None


def plugin(manager: pluggy.PluginManager) -> Metrics:
    """Return the plugin."""
    return Metrics(manager)


def _succeeded(samples: Samples, labels: tuple[str, ...], figures: Mapping[str, Any]) -> None:
    """Set all that is known of a backup that went well."""
    _put(samples, labels, figures, _OF_BACKUPS)
    _set(samples, "backup_last_success_timestamp_seconds", labels, time.time())
    _set(samples, "backup_failing", labels, 0)
    _set(samples, "backup_tracker_answered", labels, bool(figures["tracker"]))
    _set(samples, "backup_tracker_ready", labels, figures["tracker_ready"])
    for tier in Tier:
        _set(samples, "backup_tier", (*labels, tier.value), figures["tier"] == tier.value)
    _count(samples, "backup_successes_total", labels, 1)
    _count(samples, "backup_failures_total", labels, 0)


def _failed(samples: Samples, labels: tuple[str, ...]) -> None:
    """Count a backup that failed."""
    _set(samples, "backup_last_failure_timestamp_seconds", labels, time.time())
    _set(samples, "backup_failing", labels, 1)
    _count(samples, "backup_failures_total", labels, 1)
    _count(samples, "backup_successes_total", labels, 0)


def _put(samples: Samples, labels: tuple[str, ...], figures: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Set the metrics that figures become; of a list it is how long it is."""
    for figure, name in named.items():
        if figure in figures:
            value = figures[figure]
            _set(samples, name, labels, len(value) if isinstance(value, list) else value)


def _set(samples: Samples, name: str, labels: tuple[str, ...], value: float) -> None:
    samples[key(FAMILIES[f"blockferry_{name}"].name, labels)] = float(value)


def _count(samples: Samples, name: str, labels: tuple[str, ...], more: int) -> None:
    counter = key(FAMILIES[f"blockferry_{name}"].name, labels)
    samples[counter] = samples.get(counter, 0) + more
