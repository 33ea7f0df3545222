"""Trackers: which bytes of a volume changed since a checkpoint; one module a way to know."""
