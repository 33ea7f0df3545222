"""Volumes that several hosts share: their backup as of one instant, while all of them go on writing."""
