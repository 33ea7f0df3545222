"""XFS, offline: the free space btrees, and whether the log lets them be believed."""
