"""The disk of a running QEMU machine, reached through the machine's monitor.

name.py       what the user writes: qemu:SOCKET:NODE
qmp.py        the monitor
disk.py       the disk as a volume
fleecing.py   what is added to the machine for a backup, and taken away again
watchdog.py   the process that takes it away whatever happens
freeze.py     holding the disk still
tracker.py    what changed, by QEMU's dirty bitmaps
"""
