"""Making a volume hold still for the length of a backup: one module a way."""
