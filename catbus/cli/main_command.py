"""The command itself: which commands there are, and what is said when one of them fails."""

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
from .log_configuration import configure_logging, redact_text

COMMANDS = ("run", "check", "init", "repair", "grant", "token", "role", "revoke", "status", "pub", "sub", "fuzz")
"""In the order in which one meets them. Each is a module here, which is imported when it is needed."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f".commands.{cmd_name}", __package__).command
        return command


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the whole story of an error.")
@click.option("--version", is_flag=True, help="Show the version.")
@click.pass_context
def catbus(context: click.Context, debug: bool, version: bool) -> None:
    """A real-time message broker with a durable log.

    \b
    Start one on this machine, then listen and talk to it from two other shells:
      catbus run --database embedded --ws-bind 127.0.0.1:8080
      catbus sub 'demo.*'
      catbus pub demo.hello '{"n": 1}'

    `catbus COMMAND --help` tells more, with examples.
    """
    if version:
        click.echo(f"catbus {release()}")
    elif context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and leave with its exit status: 0, 1 for what went wrong, 2 for wrong usage."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # Of the client commands nothing but their answer belongs on stdout. `run` sets up its own.
    configure_logging("warning", "auto", sys.stderr)
    try:
        status = catbus.main(args=list(arguments), prog_name="catbus", standalone_mode=False)
        sys.stdout.flush()
        close_writers()
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        # Log lines come before what is said of the end.
        close_writers()
        if "--debug" in arguments[:1]:
            traceback.print_exception(error)
        status, text = explain_error(error)
        if text:
            print(f"catbus: {text}", file=sys.stderr)
        if any(isinstance(each, BrokenPipeError) for each in _leaf_errors(error)):
            # What is still buffered has nowhere to go, and the interpreter would complain of it at the end.
            sys.stdout = None
    sys.exit(status)


def explain_error(error: BaseException) -> tuple[int, str]:
    """The exit status for an error, and the one line that says what is wrong; no line for an interruption."""
    leaves = list(_leaf_errors(error))
    if any(isinstance(each, KeyboardInterrupt | click.Abort) for each in leaves):
        return 128 + signal.SIGINT, ""
    told = next((each for each in leaves if isinstance(each, click.ClickException | CatbusError)), None)
    chosen = told or next((each for each in leaves if isinstance(each, OSError)), leaves[0])
    match chosen:
        case click.exceptions.Exit():
            return chosen.exit_code, ""
        case click.UsageError():
            return 2, _one_line(_with_hint(chosen))
        case click.ClickException():
            return 1, _one_line(chosen.format_message())
        case CatbusError():
            return 1, _one_line(str(chosen))
        case BrokenPipeError():
            return 1, "nobody reads the output any more"
        case OSError():
            place = f"{chosen.filename}: " if chosen.filename else ""
            return 1, _one_line(f"{place}{chosen.strerror or chosen}")
        case _:
            return 1, _one_line(f"internal error: {type(chosen).__name__}: {chosen} (catbus --debug ... shows where)")


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
