"""Volumes that several hosts share: what they write during a backup is logged, so that the backup is one instant."""
