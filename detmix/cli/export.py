"""The command that exports the detector of a checkpoint to ONNX."""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from detmix.cli.parser import Parser, run_command

if TYPE_CHECKING:
    from torch import Tensor

# What needs torch is imported where it is used, so that --help and mistakes take no time.

EPILOG = """\
The model takes one image of any size, float32 (3, height, width), RGB in [0, 1], and returns boxes, labels and scores
(and masks or keypoints) as torchvision does. Before it is written, the predictions of onnxruntime and torch are
compared. If they differ by more than rounding, or if there are no predictions to compare, nothing is written and the
exit status is 1. After a mistake in the options it is 2."""


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description="Export a trained detector to ONNX.", epilog=EPILOG)
    parser.add_argument("checkpoint", help="checkpoint of a training run, such as best.ckpt")
    parser.add_argument("--output", default="model.onnx", help="file to write (default: %(default)s)")
    check = parser.add_mutually_exclusive_group()
    check.add_argument(
        "--check",
        nargs="+",
        metavar="IMAGE",
        help="images, or folders of images, to compare onnxruntime and torch on, such as those of the validation "
        "split (default: 16 drawn shapes, in which a detector of other classes may find nothing)",
    )
    check.add_argument("--no_check", action="store_true", help="write the model without a comparison")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Export the checkpoint that the command line names."""
    return run_command(make_parser(prog), run, arguments, (OSError, ValueError, ImportError))


def run(args: argparse.Namespace) -> int:
    """Compare and write the model, and return the exit status."""
    try:
        from detmix.training.export import TOLERANCES, check_onnx, export_onnx, write_onnx
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is missing; install it by pip install detmix[export].") from error
    from detmix.training.checkpoint import load_detector
    from detmix.training.predict import list_images

    model, class_names = load_detector(args.checkpoint)
    images = None if args.check is None else list_images(args.check)
    content = export_onnx(model, class_names)
    if not args.no_check:
        with tempfile.TemporaryDirectory() as folder:
            parity = check_onnx(content, model, _read(Path(folder), images))
        sys.stdout.write(f"Compared {parity.detections} detections in {parity.images} images, onnxruntime to torch\n")
        for key, value in sorted(parity.differences.items()):
            sys.stdout.write(f"  {key}: largest difference {value:.2e}, tolerance {TOLERANCES[key]:g}\n")
        if not parity.holds:
            sys.stderr.write(
                f"Not written: the predictions differ, and {parity.unmatched} detections have no counterpart. A "
                "detector that is hardly trained gives many boxes equal scores, and rounding decides which are kept\n"
            )
            return 1
        if not parity.detections:
            sys.stderr.write("Not written: nothing was found to compare; give images with --check, or --no_check\n")
            return 1
    write_onnx(content, args.output)
    sys.stdout.write(f"Wrote {args.output}\n")
    return 0


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _read(folder: Path, files: list[Path] | None) -> Iterator["Tensor"]:
    import torch
    from torchvision.transforms.v2 import functional as TF

    from detmix.datasets.coco.folder import CocoFolder
    from detmix.datasets.shapes import draw_shapes
    from detmix.training.predict import make_dataset

    if files is None:
        dataset = CocoFolder(draw_shapes(folder / "shapes", num_train=16, num_val=1))
    else:
        _, dataset = make_dataset(files, [], folder / "images.json", _refuse)
    for index in range(len(dataset)):
        yield TF.to_dtype(dataset.read_image(index).as_subclass(torch.Tensor), torch.float32, scale=True)


if __name__ == "__main__":
    sys.exit(main())
