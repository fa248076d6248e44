"""Time passes over a DataLoader that decodes JPEGs and mixes in the batch, in the dataset or not at all."""

import contextlib
import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

import detmix
from detmix.datasets.coco.folder import CocoFolder
from detmix.mixing.dataset import MixUpDataset
from sections import Case, Section
from sections.inputs import Size, Target, in_words

BOXES = 8
MOST = 512  # images of a folder; a pass over all of COCO would take minutes


class PillowFolder(CocoFolder):
    """Decode all images by Pillow, as torchvision's datasets do; `CocoFolder` decodes JPEGs faster."""

    def read_image(self, index: int) -> tv_tensors.Image:
        """Read an image by Pillow."""
        with PIL.Image.open(self.images_folder / self.file_names[index]) as picture:
            return TF.to_image(picture.convert("RGB"))


def load(
    device: torch.device,
    *,
    workers: int,
    reader: type[CocoFolder] = CocoFolder,
    root: Path | None = None,
    count: int = 64,
    size: Size = (480, 640),
    batch_size: int = 8,
) -> Case:
    """Pass over a folder in COCO format, which is drawn if ``root`` is None; the device is not used.

    ``in-batch MixUp`` mixes every sample and decodes one image per sample. ``MixUpDataset`` mixes every second sample
    and decodes two images for it.
    """
    with contextlib.ExitStack() as stack:
        where = f"{root and root.name}"
        if root is None:
            where = f"{in_words(size)} pixels"
            root = draw_folder(Path(stack.enter_context(tempfile.TemporaryDirectory())), count, size)
        folder = reader(root, masks=False, keypoints=False)
        dataset = Subset(folder, range(min(len(folder), MOST)))
        kinds = {
            "in-batch MixUp": (dataset, Collate(detmix.MixUp())),
            "no mixing": (dataset, Collate()),
            "MixUpDataset p=0.5": (MixUpDataset(dataset, detmix.MixUp(p=0.5)), Collate()),
        }
        options = {"shuffle": True, "num_workers": workers, "persistent_workers": workers > 0}
        return Case(
            f"{len(dataset)} images of {where}, batches of {batch_size}",
            {
                name: functools.partial(pass_over, DataLoader(source, batch_size, collate_fn=collate, **options))
                for name, (source, collate) in kinds.items()
            },
            [(name, "no mixing") for name in kinds if name != "no mixing"],
            close=stack.pop_all().close,
        )


def pass_over(loader: DataLoader[tuple[Tensor, Target]]) -> None:
    """Load every batch and do nothing with it."""
    for _ in loader:
        pass


class Collate:
    """Make one tensor of images of one size, or a list of images of different sizes, and mix it if there is a MixUp."""

    def __init__(self, mixup: detmix.MixUp | None = None) -> None:
        self.mixup = mixup

    def __call__(self, samples: Sequence[tuple[Tensor, Target]]) -> tuple[Tensor | Sequence[Tensor], Sequence[Target]]:
        """Return the batch of some samples."""
        images, targets = zip(*samples, strict=True)
        out = memory_for(images)
        if self.mixup is None:
            return images if out is None else torch.stack(images, out=out), targets
        return self.mixup(images, targets, out=out)


def memory_for(images: Sequence[Tensor]) -> Tensor | None:
    """Allocate a tensor for images of one size; in a worker it is shared, as in torch's own collate function."""
    if len({image.shape for image in images}) > 1:
        return None
    shape, dtype = (len(images), *images[0].shape), images[0].dtype
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(len(images) * images[0].nbytes)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def draw_folder(root: Path, count: int, size: Size) -> Path:
    """Draw a folder in COCO format of smooth noise that compresses like photographs: 34 kB for 480 x 640 pixels."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "annotations").mkdir()
    height, width = size
    for index in range(count):
        pixels = np.full((height, width, 3), 127.0)
        for cell, contrast in ((64, 50), (16, 15), (4, 8)):
            for channel in np.moveaxis(pixels, 2, 0):
                noise = rng.normal(0, contrast, (-(-height // cell), -(-width // cell))).astype(np.float32)
                channel += PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC)
        PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{index}.jpg")
    corners = rng.uniform(0, 0.7, (count * BOXES, 2)) * (width, height)
    sides = rng.uniform(0.05, 0.3, (count * BOXES, 2)) * (width, height)
    boxes = np.concatenate([corners, sides], 1).tolist()
    annotations = [
        {"id": i, "image_id": i // BOXES, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": height, "width": width} for i in range(count)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


SECTION = Section(
    {
        f"{workers} workers{kind}": functools.partial(load, workers=workers, reader=reader)
        for kind, reader in (("", CocoFolder), (" Pillow", PillowFolder))
        for workers in (0, 2)
    },
    options=("root",),
)
