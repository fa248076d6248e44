"""Export the detector of a checkpoint: ``tools/export_onnx.py runs/demo/version_0/checkpoints/best.ckpt``."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from detmix.datasets.coco.folder import CocoFolder
from detmix.datasets.shapes import draw_shapes
from detmix.training.checkpoint import load_detector
from detmix.training.files import write_json
from detmix.training.predict import list_images, make_table

EPILOG = """\
The file takes one image of any size, float32 (3, height, width), RGB in [0, 1], and returns boxes, labels and scores
(and masks or keypoints) as torchvision does. Before it is written, onnxruntime and torch are compared; if they differ
by more than rounding, or nothing was found that could be compared, nothing is written and the exit status is 1. After a
mistake it is 2."""


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Export a trained detector to ONNX.", epilog=EPILOG)
    parser.add_argument("checkpoint", help="A checkpoint of tools/train.py, such as best.ckpt.")
    parser.add_argument("--output", default="model.onnx", help="The file to write; model.onnx by default.")
    check = parser.add_mutually_exclusive_group()
    check.add_argument(
        "--check",
        nargs="+",
        metavar="IMAGE",
        help="Images, or folders of them, to compare onnxruntime and torch on, such as those of the validation split. "
        "By default 16 drawn shapes, in which a detector of other things may find nothing.",
    )
    check.add_argument("--no_check", action="store_true", help="Write without a comparison.")
    args = parser.parse_args()
    try:
        return _export(args)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")


def _export(args: argparse.Namespace) -> int:
    try:
        from detmix.training.export import TOLERANCES, check_onnx, export_onnx, write_onnx
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is missing; pip install detmix[export] brings it.") from error
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
                f"Not written: they differ, and {parity.unmatched} detections have no counterpart (which boxes of "
                "equal scores are kept is a matter of their order; a detector that is hardly trained has many)\n"
            )
            return 1
        if not parity.detections:
            sys.stderr.write("Not written: nothing was found to compare; give images with --check, or --no_check\n")
            return 1
    write_onnx(content, args.output)
    sys.stdout.write(f"Wrote {args.output}\n")
    return 0


def _read(folder: Path, files: list[Path] | None) -> Iterator[Tensor]:
    if files is None:
        dataset = CocoFolder(draw_shapes(folder / "shapes", num_train=16, num_val=1))
    else:
        unreadable: list[str] = []
        table = make_table(files, [], unreadable.append)
        write_json(table, folder / "images.json")
        if unreadable:
            raise ValueError(unreadable[0])
        dataset = CocoFolder(table["info"]["images_folder"], folder / "images.json", ".", check_files=False)
    for index in range(len(dataset)):
        yield TF.to_dtype(dataset[index][0].as_subclass(Tensor), torch.float32, scale=True)


if __name__ == "__main__":
    sys.exit(main())
