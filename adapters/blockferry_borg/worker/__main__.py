"""Starts the worker. Only this package is taken from where it lies; all else is what borg itself would find."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts a script's own directory first: nothing of borg's may be looked for in it.
    sys.path.pop(0)
    # Last, and only for our own modules: a borg that lies beside us is not the one that was asked for.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    process = importlib.import_module("blockferry_borg.worker.process")
    sys.path.pop()
    sys.exit(process.main())
