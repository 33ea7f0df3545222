"""Volumes as files, for as long as somebody else's backup job runs."""
