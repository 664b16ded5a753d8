"""The command `dsbert`: one thin function per subcommand. What is slow to import is imported when it is needed."""

from __future__ import annotations

import io
import os
import sys

import click

from dsbert import __version__
from dsbert.base.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_OK, DsbertError, UserError, printable
from dsbert.base.output import flush, protect
from dsbert.cli.checkpoints import COMMANDS
from dsbert.cli.cluster import JOB_COMMANDS
from dsbert.cli.data import DATA_COMMANDS
from dsbert.cli.experiment import experiment
from dsbert.cli.finetuning import finetune
from dsbert.cli.monitoring import MONITORING_COMMANDS
from dsbert.cli.parameters import local_rank_option
from dsbert.cli.training import pretrain


@click.group(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dsbert")
@local_rank_option
def app() -> None:
    """Pre-train BERT with weights that are sparse from the first step to the last."""


for _command in (pretrain, finetune, *JOB_COMMANDS, experiment, *MONITORING_COMMANDS, *DATA_COMMANDS, *COMMANDS):
    app.add_command(_command)


def main() -> None:
    """The console script."""
    protect()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files that are no text
    code = run(sys.argv[1:])
    try:
        flush()
    except (DsbertError, OSError) as error:
        code = code or EXIT_INTERNAL
        if isinstance(error, DsbertError):
            print(f"dsbert: {error}", file=sys.stderr)
    if "torch" in sys.modules and "RANK" in os.environ:
        # Ranks leave without the interpreter's teardown: a communicator whose peer is gone may hang or abort in it.
        os._exit(code)
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code. A DsbertError becomes one line on standard error."""
    try:
        _assert_utf8(argv)
        code = app.main(argv, prog_name="dsbert", obj=argv, standalone_mode=False)
        return code if isinstance(code, int) else EXIT_OK
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        place = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "dsbert"
        message = printable(" ".join(error.format_message().split()).rstrip("."))
        print(f"dsbert: {message}; see `{place} --help`", file=sys.stderr)
        return error.exit_code
    except click.Abort:
        # What is made aside is renamed when it is whole, and a preparation keeps its pieces.
        print("dsbert: interrupted: nothing is half done; the same command goes on or begins again", file=sys.stderr)
        return EXIT_INTERRUPTED
    except DsbertError as error:
        if not error.shared or os.environ.get("RANK", "0") == "0":
            print(f"dsbert: {printable(error)}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:  # a bug of ours: shown whole, and always exit code 1
        import traceback

        print(printable(traceback.format_exc(), lines=True), end="", file=sys.stderr)
        return EXIT_INTERNAL


def _assert_utf8(argv: list[str]) -> None:
    """Records are JSON and YAML, which cannot name a file by bytes that are no text."""
    for word in (*argv, os.getcwd()):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"expected arguments and a working directory in UTF-8, found {os.fsencode(word)!r}"
            ) from None
