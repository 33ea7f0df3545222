"""Volumes that several hosts share: what each logs while they are backed up, and what is made of the logs."""
