"""The parser of the commands that take a config."""

import re
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from detmix.cli.parser import one_line

LIGHTNINGS = ("Customize every aspect of training", "Save the model after every epoch", "Runs the full", "Perform one")
"""How the titles of groups with Lightning's own options start."""


class ConfigParser(LightningArgumentParser):
    """Report a mistake in one line, ``error: ...``, and exit with status 2; shorten the help."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the message in one line, without the hundred lines of the usage."""
        if not self.exit_on_error:  # jsonargparse tries whether a value fits
            super().error(message, ex)
        text, _, _ = message.partition("Given value type: ")  # the classes of jsonargparse that hold the value
        text = re.sub(r'Parser key "([^"]+)":', r"--\1:", text)
        self.exit(2, f"error: {one_line(text)}\n")

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help with Lightning's own options last, and without repeating all options in the usage."""
        groups: Any = self._action_groups
        groups.sort(key=lambda group: (group.title or "").startswith(LIGHTNINGS))
        usage, blank, options = super().format_help(*args, **kwargs).partition("\n\n")
        if usage.count("\n") > 9:
            usage = f"usage: {self.prog.replace(' [options]', '')} [options]"
        # Lists of all transforms and callbacks; --data.augment.help and the like still describe each class.
        return usage + blank + re.sub(r",\s+known\s+subclasses:\s[^()]*\)", ")", options)
