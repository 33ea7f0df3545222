"""Hot restore: a volume that is usable while it is brought back from a repository."""
