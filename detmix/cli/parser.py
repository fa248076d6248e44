"""What the commands share. It imports no torch, so that --help and mistakes take no time."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Report a mistake in one line, ``error: ...``, and exit with status 2."""

    def error(self, message: str | Exception) -> NoReturn:
        """Exit with the message in one line, without the usage."""
        self.exit(2, f"error: {one_line(message)}\n")


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[Any], int],
    arguments: Sequence[str] | None,
    mistakes: tuple[type[Exception], ...] = (OSError, ValueError),
) -> int:
    """Run a command, and report a mistake in one line: the body of each command's ``main(arguments, prog)``.

    Args:
        parser: Parser of the command line.
        run: Called with what the parser has read. It returns the exit status.
        arguments: Arguments of the command line; those of the process if ``None``.
        mistakes: Errors that are reported in one line, with status 2.

    Returns:
        The exit status.
    """
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except mistakes as error:
        parser.error(str(error))


def one_line(message: str | Exception) -> str:
    """Return a message without its line breaks."""
    return " ".join(str(message).split())


def at_least(least: int) -> Callable[[str], int]:
    """Return a type for ``add_argument``: whole numbers from ``least`` up."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, but it is {text!r}")
        return number

    return whole_number


def writable_file(text: str) -> Path:
    """Return the path of a file that can be written: a type for ``add_argument`` that fails before the work starts."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, but {text} is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; is its folder there?")
    return path
