"""Volumes that several hosts share: one module a thing that has to be done."""
