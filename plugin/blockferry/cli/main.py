"""The `blockferry` command: its options, and how every error leaves it."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from blockferry.cli.context import Context
from blockferry.cli.examples import examples_last
from blockferry.cli.output import Output, log
from blockferry.errors import BlockferryError
from blockferry.service import notify_systemd

COMMANDS = {
    "used": "inspect",
    "changed": "inspect",
    "group": "group",
    "backup": "backup",
    "snapshots": "inspect",
    "show": "inspect",
    "restore": "restore",
    "verify": "restore",
    "files": "files",
    "mount": "mount",
    "attach": "hot",
    "serve": "serve",
    "status": "hot",
    "detach": "hot",
    "arm": "arm",
    "disarm": "arm",
    "armed": "arm",
    "watch": "arm",
    "udev": "arm",
    "merge": "chains",
    "apply-log": "chains",
    "delete": "chains",
    "prune": "prune",
    "track": "track",
    "guard": "guard",
    "cluster": "cluster",
    "export": "export",
    "release": "export",
    "schedule": "schedule",
    "systemd": "systemd",
    "config": "config",
    "doctor": "admin",
    "catalog": "admin",
    "completion": "completion",
}
"""The commands, in the order of the help, and which module of this package each is in."""


class _Commands(click.Group):
    """Commands of which only that which is run is loaded: what hot restore needs costs a backup nothing."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Return a command, None if there is none of that name."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"blockferry.cli.{COMMANDS[name]}")
        return examples_last(getattr(module, name.replace("-", "_")))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="blockferry")
@click.option(
    "--config", metavar="FILE", help="The configuration; else BLOCKFERRY_CONFIG or /etc/blockferry/config.yaml."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--log-json", is_flag=True, help="Write log lines, progress and errors as JSON lines on stderr.")
@click.option("-v", "--verbose", count=True, help="Say more; twice: everything.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
@click.pass_context
def cli(context: click.Context, config: str | None, as_json: bool, log_json: bool, verbose: int, quiet: bool) -> None:
    """Block-level backup of volumes into borg and restic repositories, and their restore.

    A VOLUME is a block device or an image file. A SNAPSHOT is the id that `backup` printed, a unique prefix of it,
    or `latest`.

    \b
    Examples:
      blockferry backup /dev/vg/home --repo borg:/srv/backup/borg
      blockferry restore latest /dev/sdb --repo borg:/srv/backup/borg
    """
    output = Output(as_json=as_json, log_json=log_json, verbosity=-1 if quiet else verbose)
    context.obj = Context(output, config)
    if config:
        os.environ["BLOCKFERRY_CONFIG"] = os.path.abspath(config)  # noqa: PTH100  # also for processes that stay


examples_last(cli)


class _TerminatedError(BaseException):
    """SIGTERM or SIGHUP: everything is unwound as for Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> NoReturn:
    """Run a command and leave with its exit code: 0 done, 1 failed, 2 usage, 3 partial, 75 not now."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code; whatever it raises becomes a line or two on stderr."""
    output = Output(as_json=False, log_json="--log-json" in arguments, verbosity=0)
    try:
        result = cli.main(args=arguments, prog_name="blockferry", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SystemExit as error:  # rich's way to say that whoever read a table went away
        return 128 + signal.SIGPIPE if error.code else 0
    except BrokenPipeError:
        # Whoever read our output went away; what stdout still holds must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except BaseException as error:
        log.debug("where it happened", exc_info=True)
        told, code = _told(error)
        output.error(told)
        return code
    return result if isinstance(result, int) else 0


def _told(error: BaseException) -> tuple[BlockferryError, int]:
    """Return what to tell the user of an exception, and the exit code."""
    nothing_left = "Nothing that looks complete was left behind."
    if isinstance(error, BlockferryError):
        return error, error.exit_code
    if isinstance(error, _TerminatedError):
        name = signal.Signals(error.number).name
        return BlockferryError(f"ended by {name}", remedy=nothing_left), 128 + error.number
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return BlockferryError("interrupted", remedy=nothing_left), 128 + signal.SIGINT
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return BlockferryError(f"{where}{error.strerror or error}"), BlockferryError.exit_code
    message = f"internal error: {type(error).__name__}: {error}"
    remedy = "Please report it, with what `blockferry -vv ...` prints."
    return BlockferryError(message, remedy=remedy), BlockferryError.exit_code


def _terminate(number: int, _frame: FrameType | None) -> None:
    notify_systemd("STOPPING=1")
    raise _TerminatedError(number)
