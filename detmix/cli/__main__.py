"""The ``detmix`` command: it runs ``detmix fit --config configs/demo.yaml`` and the other commands by their names."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "fit": ("train", "train a detector"),
    "validate": ("train", "compute the AP of a checkpoint"),
    "preview": ("preview", "draw training samples as they will be mixed"),
    "check": ("check", "find every defect of a dataset in COCO format, and write a copy without them"),
    "predict": ("predict", "predict with a trained detector"),
    "export": ("export", "export a trained detector to ONNX"),
    "ablate": ("ablate", "compare trainings in a grid of arms, sets and seeds"),
}
"""Each command with its module, which is imported when the command runs, and with what it does."""

HELP = f"""\
usage: detmix COMMAND [options]

Mixup for object detection.

commands:
{"".join(f"  {name:10}{text}{chr(10)}" for name, (_, text) in COMMANDS.items())}
detmix COMMAND --help describes the options of a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names.

    Args:
        arguments: Of the command line; those of the process by default.

    Returns:
        The exit status.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0 if given else 2
    name = given[0]
    if name not in COMMANDS:
        sys.stderr.write(f"error: command must be one of {', '.join(COMMANDS)}, but it is {name!r}\n")
        return 2
    module = importlib.import_module(f"detmix.cli.{COMMANDS[name][0]}")
    if COMMANDS[name][0] == "train":  # which parses the name of its command itself
        status: int = module.main(arguments, prog="detmix")
    else:
        status = module.main(given[1:], prog=f"detmix {name}")
    return status


if __name__ == "__main__":
    sys.exit(main())
