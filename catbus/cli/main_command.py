"""The `catbus` command: the group of all commands, its exit status and its error messages."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

import click

from ..errors import CatbusError
from ..version import version as release
from .line_writer import close_writers
from .log_configuration import configure_logging
from .log_redaction import redact_text

COMMANDS = (
    *("run", "check", "init", "repair", "erase", "consumer", "grant", "token", "role", "revoke"),
    *("status", "sessions", "channels", "disconnect", "pub", "sub", "get", "set", "presence", "bench", "why", "fuzz"),
)
"""The commands in the order of `--help`. Each is a module of `commands`, imported when it is used."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f".commands.{cmd_name}", __package__).command
        return command


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--version", is_flag=True, help="Show the version.")
@click.pass_context
def catbus(context: click.Context, debug: bool, version: bool) -> None:
    """A real-time message broker with a durable log.

    \b
    Start a broker on this machine, then subscribe and publish from two other shells:
      catbus run --database embedded --ws-bind 127.0.0.1:8080
      catbus sub 'demo.*'
      catbus pub demo.hello '{"n": 1}'

    `catbus COMMAND --help` shows details and examples.
    """
    if version:
        click.echo(f"catbus {release()}")
    elif context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit: 0 for success, 1 for a failure, 2 for wrong usage, 3 for a conflict."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # Client commands write only their results to stdout. `run` configures its own logging.
    configure_logging("warning", "auto", sys.stderr)
    try:
        status = catbus.main(args=list(arguments), prog_name="catbus", standalone_mode=False)
        sys.stdout.flush()
        close_writers()
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        # Write the waiting log lines before the error message.
        close_writers()
        if "--debug" in arguments[:1]:
            traceback.print_exception(error)
        status, text = explain_error(error)
        if text:
            print(f"catbus: {text}", file=sys.stderr)
        if any(isinstance(each, BrokenPipeError) for each in _leaf_errors(error)):
            # Buffered output cannot be written, and the interpreter would report that at exit.
            sys.stdout = None
    sys.exit(status)


def explain_error(error: BaseException) -> tuple[int, str]:
    """Return the exit status for an error and its message in one line. An interruption has no message."""
    leaves = list(_leaf_errors(error))
    if any(isinstance(each, KeyboardInterrupt | click.Abort) for each in leaves):
        return 128 + signal.SIGINT, ""
    reported = next((each for each in leaves if isinstance(each, click.ClickException | CatbusError)), None)
    chosen = reported or next((each for each in leaves if isinstance(each, OSError)), leaves[0])
    match chosen:
        case click.exceptions.Exit():
            return chosen.exit_code, ""
        case click.UsageError():
            return 2, _one_line(_with_hint(chosen))
        case click.ClickException():
            return chosen.exit_code, _one_line(chosen.format_message())
        case CatbusError():
            return 1, _one_line(str(chosen))
        case BrokenPipeError():
            return 1, "the output was closed by its reader"
        case OSError():
            place = f"{chosen.filename}: " if chosen.filename else ""
            return 1, _one_line(f"{place}{chosen.strerror or chosen}")
        case _:
            return 1, _one_line(
                f"internal error: {type(chosen).__name__}: {chosen} (run it with catbus --debug for the traceback)"
            )


def _leaf_errors(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaf_errors(each)
    else:
        yield error


def _with_hint(error: click.UsageError) -> str:
    text = error.format_message()
    return f"{text.removesuffix('.')} (see {error.ctx.command_path} --help)" if error.ctx else text


def _one_line(text: str) -> str:
    return redact_text(" ".join(text.split()))
