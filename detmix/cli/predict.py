"""The command that predicts with the detector of a checkpoint."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detmix.cli.parser import Parser, at_least, run_command
from detmix.training.files import write_json

if TYPE_CHECKING:
    import torch

    from detmix.datasets.coco.folder import CocoFolder
    from detmix.datasets.coco.table import Record
    from detmix.training.predict import Report

# What needs torch is imported where it is used, so that --help and mistakes take no time.

EPILOG = """\
The output folder gets predictions.json, a list of COCO results with every box, mask and keypoint that the detector
returns; pictures/, the images with the predictions of at least --min_score drawn into them; and, without --annotations,
images.json, which says what the image and category ids mean. A file that cannot be read is named and left out, and the
exit status is then 1. After a mistake in the options it is 2, and nothing is predicted."""


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description="Predict with a trained detector.", epilog=EPILOG)
    parser.add_argument("checkpoint", help="checkpoint of a training run, such as best.ckpt")
    parser.add_argument("images", nargs="+", help="image files, and folders that are searched for images")
    parser.add_argument("--output", default="predictions", help="folder to write into (default: %(default)s)")
    parser.add_argument(
        "--annotations",
        help="COCO json with the classes of the checkpoint. Predict on the images that it lists, in the one folder "
        "given as images, and use its image and category ids",
    )
    parser.add_argument(
        "--min_score",
        type=float,
        default=0.3,
        help="minimum score of predictions that are drawn (default: %(default)s)",
    )
    parser.add_argument("--no_pictures", action="store_true", help="write no pictures")
    parser.add_argument(
        "--batch_size",
        type=at_least(1),
        default=1,
        help="images per batch (default: %(default)s). Images of one batch are padded to one size, which moves boxes "
        "a little",
    )
    parser.add_argument(
        "--num_workers",
        type=at_least(0),
        default=0,
        help="processes that read images (default: %(default)s, the main process)",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is one, else cpu)")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Predict on the images that the command line names."""
    return run_command(make_parser(prog), run, arguments)


def run(args: argparse.Namespace) -> int:
    """Predict, and return the exit status."""
    import torch

    try:
        return _predict(args)
    except torch.OutOfMemoryError as error:
        raise OSError(str(error)) from error  # a mistake of the options, such as too large a batch


def _predict(args: argparse.Namespace) -> int:
    from detmix.training.checkpoint import load_detector
    from detmix.training.predict import write_predictions

    unreadable: list[str] = []

    def report(message: str) -> None:
        unreadable.append(message)
        sys.stderr.write(f"{message}\n")

    device = _device(args.device)
    model, class_names = load_detector(args.checkpoint)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    if args.annotations is None:
        content, dataset = _list_images(args.images, class_names, output, report)
    else:
        content, dataset = None, _read_annotations(args.images, args.annotations, class_names)
    ids = write_predictions(
        model.to(device),
        dataset,
        output,
        report,
        min_score=args.min_score,
        pictures=not args.no_pictures,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=device,
    )
    if content is not None:  # an image that turned out damaged would look like one without objects
        content["images"] = [image for image in content["images"] if image["id"] in set(ids)]
        write_json(content, output / "images.json")
    sys.stdout.write(f"Predicted on {len(ids)} images; the results are in {output}\n")
    return 1 if unreadable else 0


def _list_images(
    paths: Sequence[str], class_names: Sequence[str], output: Path, report: "Report"
) -> tuple["Record", "CocoFolder"]:
    from detmix.training.predict import list_images, make_dataset

    return make_dataset(list_images(paths, leave_out=output), class_names, output / "images.json", report)


def _read_annotations(folders: Sequence[str], annotations: str, class_names: tuple[str, ...]) -> "CocoFolder":
    from detmix.datasets.coco.folder import CocoFolder

    if len(folders) > 1 or not Path(folders[0]).is_dir():
        raise ValueError(
            "with --annotations, images must be the one folder that its file names start from, but it is "
            f"{' '.join(folders)}."
        )
    file = Path(annotations).absolute()
    dataset = CocoFolder(folders[0], file, ".", crowd=True, masks=False, keypoints=False, check_files=False)
    if dataset.class_names != class_names:
        raise ValueError(
            f"annotations must have the classes of the checkpoint, {', '.join(class_names)}, but those of "
            f"{annotations} are {', '.join(dataset.class_names)}."
        )
    return dataset


def _device(name: str | None) -> "torch.device":
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device fails here
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(
            f"device must be one of this machine, but is {name!r}: {str(error).splitlines()[0]}"
        ) from error
    return device


if __name__ == "__main__":
    sys.exit(main())
