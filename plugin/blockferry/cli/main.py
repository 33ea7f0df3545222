"""The `blockferry` command: its options, and how every error leaves it."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from blockferry.cli import admin, backup, inspect, restore
from blockferry.cli.context import Context
from blockferry.cli.output import Output, log
from blockferry.errors import BlockferryError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="blockferry")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--log-json", is_flag=True, help="Write log lines, progress and errors as JSON lines on stderr.")
@click.option("-v", "--verbose", count=True, help="Say more; twice: everything.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
@click.pass_context
def cli(context: click.Context, as_json: bool, log_json: bool, verbose: int, quiet: bool) -> None:
    """Block-level backup of volumes into borg and restic repositories, and their restore.

    A VOLUME is a block device or an image file. A SNAPSHOT is the id that `backup` printed, a unique prefix of it,
    or `latest`.
    """
    context.obj = Context(Output(as_json=as_json, log_json=log_json, verbosity=-1 if quiet else verbose))


for command in (
    inspect.used,
    backup.backup,
    inspect.snapshots,
    inspect.show,
    restore.restore,
    restore.verify,
    admin.doctor,
    admin.catalog,
):
    cli.add_command(command)


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
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BlockferryError as error:
        output.error(error)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        output.error(BlockferryError("interrupted", remedy="Nothing that looks complete was left behind."))
        return 128 + signal.SIGINT
    except _TerminatedError as error:
        name = signal.Signals(error.number).name
        output.error(BlockferryError(f"ended by {name}", remedy="Nothing that looks complete was left behind."))
        return 128 + error.number
    except BrokenPipeError:
        # Whoever read our output went away; what stdout still holds must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        output.error(BlockferryError(f"{where}{error.strerror or error}"))
        return 1
    except Exception as error:
        log.debug("unexpected", exc_info=True)
        message = f"internal error: {type(error).__name__}: {error}"
        output.error(BlockferryError(message, remedy="Please report it, with what `blockferry -vv ...` prints."))
        return 1


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise _TerminatedError(number)
