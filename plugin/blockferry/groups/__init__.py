"""Groups of files: what is in one, and when it is backed up."""
