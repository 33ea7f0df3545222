"""blockferry's adapter for restic repositories."""
