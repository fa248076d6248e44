"""Predict with a checkpoint: ``tools/predict.py runs/demo/version_0/checkpoints/best.ckpt images/``."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from detmix.datasets.coco.folder import CocoFolder
from detmix.training.checkpoint import load_detector
from detmix.training.files import write_json
from detmix.training.predict import list_images, make_table, write_predictions

EPILOG = """\
Written into the output folder: predictions.json, a list of COCO results with every box, mask and keypoint that the
detector returns; pictures/, what scores at least --min_score drawn into the images; and, without --annotations,
images.json, which says which file and class the ids stand for. A file that cannot be read is named, and the others go
on; the exit status is then 1. After a mistake it is 2 and nothing is predicted."""


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Predict with a trained detector.", epilog=EPILOG)
    parser.add_argument("checkpoint", help="A checkpoint of tools/train.py, such as best.ckpt.")
    parser.add_argument("images", nargs="+", help="Image files, and folders that are searched for images.")
    parser.add_argument("--output", default="predictions", help="The folder to write into; predictions by default.")
    parser.add_argument(
        "--annotations",
        help="A COCO json with the classes of the checkpoint. Its images are predicted on, in the one folder given, "
        "and image and category ids are its own.",
    )
    parser.add_argument("--min_score", type=float, default=0.3, help="Of what is drawn; 0.3 by default.")
    parser.add_argument("--no_pictures", action="store_true", help="Write the json only.")
    parser.add_argument(
        "--batch_size",
        type=_at_least(1),
        default=1,
        help="Images a batch, 1 by default. The images of a batch are padded to one size, which moves boxes a little.",
    )
    parser.add_argument("--num_workers", type=_at_least(0), default=0, help="Processes that read images; 0 by default.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"Such as cpu or cuda:1; {default} here by default.")
    args = parser.parse_args()
    unreadable: list[str] = []
    try:
        _predict(args, lambda message: (unreadable.append(message), sys.stderr.write(f"{message}\n")))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    return 1 if unreadable else 0


def _predict(args: argparse.Namespace, report) -> None:
    device = _device(args.device)
    model, class_names = load_detector(args.checkpoint)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    table = None
    if args.annotations is None:
        files = list_images(args.images, leave_out=output)
        table = make_table(files, class_names, report)
        if not table["images"]:
            raise ValueError(f"none of {len(files)} files can be read.")
        write_json(table, output / "images.json")
        dataset = CocoFolder(
            table["info"]["images_folder"], (output / "images.json").absolute(), ".", check_files=False
        )
    else:
        if len(args.images) > 1 or not Path(args.images[0]).is_dir():
            raise ValueError(
                "with --annotations, images must be the one folder that its file names start from, but it is "
                f"{' '.join(args.images)}."
            )
        options = {"crowd": True, "masks": False, "keypoints": False, "check_files": False}
        dataset = CocoFolder(args.images[0], Path(args.annotations).absolute(), ".", **options)
        if dataset.class_names != class_names:
            raise ValueError(
                f"annotations must have the classes of the checkpoint, {', '.join(class_names)}, but those of "
                f"{args.annotations} are {', '.join(dataset.class_names)}."
            )
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
    if table is not None:  # an image that turned out damaged would look like one without objects
        table["images"] = [image for image in table["images"] if image["id"] in set(ids)]
        write_json(table, output / "images.json")
    sys.stdout.write(f"Predicted on {len(ids)} images; the results are in {output}\n")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which meta has no answer to
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(
            f"device must be one of this machine, but is {name!r}: {str(error).splitlines()[0]}"
        ) from error
    return device


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if (number := int(text)) < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, but it is {number}")
        return number

    return integer


if __name__ == "__main__":
    sys.exit(main())
