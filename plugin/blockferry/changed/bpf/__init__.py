"""The tracker of any block device on a stock kernel: bpftrace notes what is written to it.

`device` says what is seen of a device and what not, `program` what bpftrace is told and how its word is checked,
`daemon` why no write falls between two checkpoints, `tracker` is the plugin.
"""
