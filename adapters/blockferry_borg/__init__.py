"""The borg adapter of blockferry."""
