"""The metrics, by name: what each counts, in what unit, and which labels tell its samples apart.

`docs/metrics.md` lists the same. Units are base units, and at the end of the name, as Prometheus wants them
(https://prometheus.io/docs/practices/naming/).
"""

from __future__ import annotations

import dataclasses

_BACKUP = ("volume", "repository")
_RESTORE = ("volume",)
_HOT = ("name",)


@dataclasses.dataclass(frozen=True)
class Family:
    """One metric. `help` is one line without backslashes."""

    name: str
    labels: tuple[str, ...]
    help: str

    @property
    def type(self) -> str:
        """Return what Prometheus calls its kind."""
        return "counter" if self.name.endswith("_total") else "gauge"


_ALL = (
    Family("blockferry_backup_last_success_timestamp_seconds", _BACKUP, "When the last backup that went well ended."),
    Family("blockferry_backup_last_failure_timestamp_seconds", _BACKUP, "When a backup failed last."),
    Family("blockferry_backup_failing", _BACKUP, "Whether the last backup failed: 1, or 0."),
    Family("blockferry_backup_successes_total", _BACKUP, "Backups that went well."),
    Family("blockferry_backup_failures_total", _BACKUP, "Backups that failed."),
    Family("blockferry_backup_duration_seconds", _BACKUP, "How long the last backup took."),
    Family("blockferry_backup_volume_bytes", _BACKUP, "Size of the volume."),
    Family("blockferry_backup_used_bytes", _BACKUP, "How much of the volume was in use."),
    Family("blockferry_backup_changed_bytes", _BACKUP, "How much had changed, or had to be taken for changed."),
    Family("blockferry_backup_read_bytes", _BACKUP, "How much the last backup read."),
    Family("blockferry_backup_stored_bytes", _BACKUP, "By how much the last backup made the repository grow."),
    Family(
        "blockferry_backup_tier", (*_BACKUP, "tier"), "The step of the ladder that the last backup took: 1; else 0."
    ),
    Family("blockferry_backup_tracker_answered", _BACKUP, "Whether a tracker listed what had changed: 1, or 0."),
    Family("blockferry_backup_tracker_ready", _BACKUP, "Whether a tracker notes what changes until the next one."),
    Family("blockferry_backup_problem_files", _BACKUP, "Files of a group that are not stored as they should be."),
    Family("blockferry_cluster_hosts", _BACKUP, "Hosts that took part in the last backup of a shared volume."),
    Family("blockferry_cluster_shares", _BACKUP, "Shares in which a shared volume was copied."),
    Family("blockferry_cluster_logged_bytes", _BACKUP, "Before-images of what was overwritten during the backup."),
    Family("blockferry_cluster_held_seconds", _BACKUP, "For how long all hosts held their writes, at most."),
    Family("blockferry_restore_last_success_timestamp_seconds", _RESTORE, "When a restore of it was complete last."),
    Family("blockferry_restore_duration_seconds", _RESTORE, "How long the last restore took."),
    Family("blockferry_restore_written_bytes", _RESTORE, "How much the last restore brought back."),
    Family("blockferry_hot_updated_timestamp_seconds", _HOT, "When the process of a hot restore said all this last."),
    Family("blockferry_hot_total_bytes", _HOT, "How much there is to bring in."),
    Family("blockferry_hot_hydrated_bytes", _HOT, "How much of that is on the target, or in the buffer."),
    Family("blockferry_hot_dirty_bytes", _HOT, "How much was written to since the restore began."),
    Family("blockferry_hot_unreadable_bytes", _HOT, "How much the repository did not give."),
    Family("blockferry_hot_complete", _HOT, "Whether all is there: 1, or 0."),
    Family("blockferry_hot_failing", _HOT, "Whether something is wrong that `status` tells of: 1, or 0."),
    Family("blockferry_hot_repository_reachable", _HOT, "Whether the repository answers: 1, or 0."),
)

FAMILIES = {family.name: family for family in _ALL}
