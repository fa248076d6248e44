"""Read a folder in COCO format as (image, target) with torchvision's keys, and check every annotation."""

import operator
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision import tv_tensors

from detmix.datasets.coco.defects import LISTED, refuse
from detmix.datasets.coco.images import find_defective_files, read_rgb
from detmix.datasets.coco.objects import read_objects
from detmix.datasets.coco.table import CocoTable, Images, Record


class CocoFolder(torch.utils.data.Dataset[tuple[Any, dict[str, Any]]]):
    """Read a folder in COCO format: ``dataset[i]`` is ``(image, target)`` as torchvision's detectors take them.

    The image is a ``tv_tensors.Image``, uint8 ``(3, H, W)``, RGB. The target's keys, for N objects:

    - ``boxes``: ``tv_tensors.BoundingBoxes``, float32 ``(N, 4)``, XYXY in pixels, inside the image;
    - ``labels``: int64 ``(N,)``, 1 and up in the order of the category ids (0 is torchvision's background);
    - ``masks``: ``tv_tensors.Mask``, uint8 ``(N, H, W)``, and ``keypoints``: float32 ``(N, K, 3)``, where annotated;
    - ``area``: float32 ``(N,)``, square pixels; ``iscrowd``: int64 ``(N,)``; ``image_id``: int, the COCO id.

    Images are in the order of their ids. Images without objects are kept, with N = 0. Mistakes in the json raise at
    construction. Boxes without width or height (less than 0.01 pixels, which float32 may lose in a resize) and boxes
    wholly outside their image are left out. Boxes that reach out of their image are clipped. One warning lists the
    boxes that are left out or clipped by more than a pixel. File names must stay inside the image folder; symbolic
    links in it are followed. ``tools/check_dataset.py`` lists all mistakes at once.

    Args:
        root: Dataset folder.
        annotations: The json file, relative to ``root``.
        images: Image folder, from which the json's file names start, relative to ``root``.
        transforms: Called last, as ``transforms(image, target)``; what it returns is the sample.
        crowd: Whether to keep annotations with ``iscrowd=1``. COCO's evaluation needs them, to ignore detections there;
            training works better without.
        masks: True requires a mask of every kept annotation. False ignores masks. None reads masks if every kept
            annotation has one, and if there is an annotation.
        keypoints: The same for keypoints.
        check_files: Whether to check that every image exists and has the size that the json says. Only headers are
            read.
        unreadable: What to do with an image that is missing, cannot be decoded or has another size than the json says.
            ``"raise"`` raises. ``"skip"`` warns at construction if ``check_files`` finds it, and ``dataset[i]`` is
            ``(None, {"image_id": id, "error": message})``, not transformed, which a ``collate_fn`` can leave out.

    Attributes:
        image_ids: COCO ids of the images, int64 ``(len(dataset),)``, ascending, read-only.
        file_names: File names of the images, relative to ``images_folder``.
        sizes: Height and width of each image, int64 ``(len(dataset), 2)``, read-only.
        category_ids: ``category_ids[label - 1]`` is the COCO category id.
        class_names: ``class_names[label - 1]`` is the name of the category; the background has no name.
        num_classes: ``len(class_names) + 1``, because torchvision's detectors count the background.

    Raises:
        FileNotFoundError: if the folder, the json or an image is missing.
        ValueError: if the json is not COCO's, or contradicts itself or an image. The message names the file, the record
            and the value.

    Example:
        >>> import tempfile
        >>> from detmix.datasets.shapes import draw_shapes
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dataset = CocoFolder(draw_shapes(f"{folder}/shapes", num_train=2, num_val=1))
        ...     image, target = dataset[0]
        >>> dataset.class_names, dataset.num_classes, len(dataset)
        (('circle', 'square', 'triangle'), 4, 2)
        >>> sorted(target)
        ['area', 'boxes', 'image_id', 'iscrowd', 'keypoints', 'labels', 'masks']
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        annotations: str | os.PathLike[str] = "annotations/instances_train.json",
        images: str | os.PathLike[str] = "images",
        *,
        transforms: Callable[[Any, Any], Any] | None = None,
        crowd: bool = False,
        masks: bool | None = None,
        keypoints: bool | None = None,
        check_files: bool = True,
        unreadable: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.root, self.transforms = Path(root), transforms
        self.annotations_file, self.images_folder = find_files(self.root, annotations, images)
        self._skip = unreadable == "skip"
        if unreadable not in ("raise", "skip"):
            raise ValueError(f"unreadable is {unreadable!r}, expected 'raise' or 'skip'.")
        table = CocoTable(self.annotations_file)
        categories, listed = table.categories(), table.images()
        self.category_ids: tuple[int, ...] = tuple(categories.ids.tolist())
        self.class_names = categories.names
        self.image_ids, self.sizes = listed.ids, listed.sizes
        self.file_names: tuple[str, ...] = tuple(listed.names)
        for column in (self.image_ids, self.sizes):
            column.setflags(write=False)
        if check_files and (remark := self._check_files(listed)):
            warnings.warn(remark, stacklevel=2)

        objects = read_objects(table, listed, categories, crowd=bool(crowd), masks=masks, keypoints=keypoints)
        if objects.remark:
            warnings.warn(objects.remark, stacklevel=2)
        self._first, self._boxes, self._labels, self._iscrowd, self._area = objects[:5]
        self._keypoints, self._masks = objects.keypoints, objects.masks

    @property
    def num_classes(self) -> int:
        """Return the number of classes with the background, as torchvision's detectors count."""
        return len(self.class_names) + 1

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: SupportsIndex) -> tuple[Any, dict[str, Any]]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images of {self.annotations_file}.")
        index %= len(self)
        height, width = self.sizes[index].tolist()
        try:
            image = self.read_image(index)
        except (OSError, ValueError) as error:
            if not self._skip:
                raise
            return None, {"image_id": int(self.image_ids[index]), "error": str(error)}
        objects = slice(*self._first[index : index + 2].tolist())
        boxes = torch.tensor(self._boxes[objects])  # torch.tensor copies, so a transform cannot change the dataset
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor(self._labels[objects]),
        }
        if self._masks is not None:
            target["masks"] = tv_tensors.Mask(torch.from_numpy(self._masks.draw(objects, height, width)))
        if self._keypoints is not None:
            target["keypoints"] = torch.tensor(self._keypoints[objects])
        target["area"] = torch.tensor(self._area[objects])
        target["iscrowd"] = torch.tensor(self._iscrowd[objects])
        target["image_id"] = int(self.image_ids[index])
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        return image, target

    def read_image(self, index: int) -> tv_tensors.Image:
        """Read an image without its target.

        Args:
            index: Index of the image, from 0 to ``len(dataset) - 1``.

        Returns:
            The image, uint8 ``(3, H, W)``, RGB, untransformed.

        Raises:
            OSError: if the file is missing or cannot be decoded.
            ValueError: if the image has another size than the json says.
        """
        path, size = self.images_folder / self.file_names[index], tuple(self.sizes[index].tolist())
        pixels = read_rgb(path)
        if pixels.shape[1:] != size:
            raise ValueError(
                f"{path} is {tuple(pixels.shape[1:])} (height, width), but {self.annotations_file} says {size}."
            )
        return tv_tensors.Image(pixels)

    def to_coco(self, image_id: int, prediction: Mapping[str, Tensor]) -> list[Record]:
        """Turn one image's prediction into COCO result records: original category ids, boxes as x, y, width, height.

        Args:
            image_id: COCO id of the image, ``target["image_id"]``.
            prediction: What a torchvision detector returns, on any device: ``boxes`` ``(N, 4)`` XYXY, ``labels`` and
                ``scores`` ``(N,)``. Optional ``masks`` ``(N, 1, H, W)`` or ``(N, H, W)`` are thresholded at 0.5 and
                become compressed RLE. Optional ``keypoints`` ``(N, K, 3)`` become flat lists.

        Returns:
            N records that ``json.dumps`` and ``pycocotools.coco.COCO.loadRes`` take.

        Raises:
            ValueError: if the image id or a label is unknown, or a tensor is missing.
        """
        if int(image_id) not in self.image_ids:
            raise ValueError(f"image_id {image_id} is not one of the {len(self)} images of {self.annotations_file}.")
        given = {key: value.cpu() for key, value in prediction.items() if isinstance(value, Tensor)}
        for key in ("boxes", "labels", "scores"):
            if key not in given or len(given[key]) != len(given["boxes"]):
                shapes = {name: tuple(value.shape) for name, value in given.items()}
                raise ValueError(f"prediction has tensors of {shapes}, expected boxes (N, 4), labels and scores (N,).")
        boxes, labels = given["boxes"].as_subclass(Tensor).double(), given["labels"].tolist()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)  # (N, 4) XYWH
        for label in labels:
            if not 1 <= label <= len(self.category_ids):
                raise ValueError(f"prediction['labels'] holds {label}, expected 1 to {len(self.category_ids)}.")
        results: list[Record] = [
            {"image_id": int(image_id), "category_id": self.category_ids[label - 1], "bbox": box, "score": score}
            for label, box, score in zip(labels, boxes.tolist(), given["scores"].tolist(), strict=True)
        ]
        if "masks" in given:
            for record, mask in zip(results, given["masks"], strict=True):
                rle = coco_mask.encode(np.asfortranarray(mask.reshape(mask.shape[-2:]) > 0.5, dtype=np.uint8))
                record["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
        if "keypoints" in given:
            for record, points in zip(results, given["keypoints"], strict=True):
                record["keypoints"] = points.flatten().tolist()
        return results

    def _check_files(self, images: Images) -> str | None:
        """Raise for the first file that cannot be read; return a message on all of them if they are skipped."""
        found = []
        for defect in find_defective_files(self.annotations_file, self.images_folder, images):
            if not self._skip:
                refuse(defect)
            found.append(defect)
        if not found:
            return None
        return (
            f"{self.annotations_file}: {sum(len(defect.rows) for defect in found)} of {len(self)} images cannot be "
            f"read and are skipped: {' '.join(defect.message for defect in found[:LISTED])}"
        )


def find_files(root: Path, annotations: str | os.PathLike[str], images: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the json file and the image folder.

    Raises:
        FileNotFoundError: if ``root``, the file or the folder is missing.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"root {root} is not a folder.")
    if not (root / annotations).is_file():
        found = sorted(str(path.relative_to(root)) for pattern in ("*.json", "*/*.json") for path in root.glob(pattern))
        there = f"json files there: {', '.join(found)}" if found else "there is no json file"
        raise FileNotFoundError(f"annotations {root / annotations} is missing; {there}.")
    if not (root / images).is_dir():
        raise FileNotFoundError(f"images {root / images} is not a folder.")
    return root / annotations, root / images
