"""Block-level backup and instant restore for borg and restic."""
