"""The parser of the commands that take a config."""

from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from detmix.cli.parser import one_line


class ConfigParser(LightningArgumentParser):
    """Report a mistake in one line, ``error: ...``, and exit with status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the message in one line, without the hundred lines of the usage."""
        if not self.exit_on_error:  # jsonargparse tries whether a value fits
            super().error(message, ex)
        text, _, _ = message.partition("Given value type: ")  # the classes of jsonargparse that hold the value
        self.exit(2, f"error: {one_line(text)}\n")
