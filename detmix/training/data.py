"""The Lightning data module: COCO-format folders, Albumentations on the CPU, mixup on the device."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import albumentations as A
import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

from detmix.albumentations import AlbumentationsTransform
from detmix.checks import check_batch
from detmix.datasets.coco import CocoFolder
from detmix.datasets.shapes import draw_shapes
from detmix.functional import Sample, Target
from detmix.transforms import MixUp

Batch = tuple[list[Tensor], list[Target]]


class DetectionData(L.LightningDataModule):
    """A COCO-format folder, or the embedded set of drawn shapes.

    Images are mixed in pairs within the batch, as uint8, after they have reached the device, so each is decoded once.

    Args:
        root: The folder. Without one the embedded shapes are drawn into ``data/shapes``.
        train_annotations: COCO instances (or keypoints) file of the training split, relative to root.
        val_annotations: The same of the validation split.
        train_images: Folder of the training images, relative to root.
        val_images: Folder of the validation images, relative to root.
        batch_size: Images a batch, on each device.
        num_workers: Processes that load images, on each device.
        augment: Albumentations transforms for training. The detector resizes images itself (``model.options``), and
            validation images reach it as they are, so that AP is measured in the pixels of the annotations.
        min_visibility: A box of which augmentation leaves a smaller share inside the image is dropped.
        mixup: How and in which epochs to mix; null trains on unmixed images.

    Raises:
        FileNotFoundError, ValueError: if root does not hold a sound COCO-format dataset; see `CocoFolder`.
    """

    def __init__(
        self,
        root: str | None = None,
        train_annotations: str = "annotations/instances_train.json",
        val_annotations: str = "annotations/instances_val.json",
        train_images: str = "images",
        val_images: str = "images",
        batch_size: int = 8,
        num_workers: int = 2,
        augment: Sequence[A.BasicTransform] = (),
        min_visibility: float = 0.1,
        mixup: MixUp | None = None,
    ) -> None:
        super().__init__()
        if mixup is not None and mixup.inplace:
            raise ValueError("inplace of mixup must be false, since images of different sizes are mixed as a list.")
        self.root = root
        self.splits = {"train": (train_annotations, train_images), "val": (val_annotations, val_images)}
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = AlbumentationsTransform(augment, min_visibility=min_visibility) if augment else None
        self.mixup = mixup

    @cached_property
    def train_set(self) -> CocoFolder:
        """The training split, augmented, crowd boxes left out."""
        return self._read("train", transforms=self.augment)

    @cached_property
    def val_set(self) -> CocoFolder:
        """The validation split as it is, with the crowd boxes that COCO evaluation needs to know."""
        return self._read("val", crowd=True)

    @property
    def num_classes(self) -> int:
        """Classes of the training split, background included."""
        return self.train_set.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of classes 1, 2, ...; of the training split."""
        return self.train_set.class_names

    def _read(self, split: str, **options: Any) -> CocoFolder:
        root = Path(draw_shapes("data/shapes") if self.root is None else self.root)
        return CocoFolder(root, *self.splits[split], **options)

    def setup(self, stage: str) -> None:
        """Read and check both splits before anything is trained."""
        if self.train_set.class_names != self.val_set.class_names:
            raise ValueError(
                f"{self.splits['train'][0]} and {self.splits['val'][0]} must have the same categories, but have "
                f"{self.train_set.class_names} and {self.val_set.class_names}."
            )

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled batches; the last, smaller one is left out."""
        if len(self.train_set) < self.batch_size:
            raise ValueError(
                f"batch_size must be at most the {len(self.train_set)} training images, but is {self.batch_size}."
            )
        return self._loader(self.train_set, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Every validation image once, in order."""
        return self._loader(self.val_set)

    def _loader(self, dataset: CocoFolder, **options: Any) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            **options,
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Check a batch on the CPU, where looking at values costs no wait for the device."""
        check_batch(*batch, num_classes=self.num_classes)
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Mix a training batch on its device, then make the images float32 in [0, 1]."""
        images, targets = batch
        if self.mixup and self.trainer and self.trainer.training:
            self.mixup.set_epoch(self.trainer.current_epoch)
            images, targets = self.mixup(images, targets)
        return [TF.to_dtype(image, torch.float32, scale=True) for image in images], targets


def collate(samples: Sequence[Sample]) -> Batch:
    """Images of any sizes as a list, and their targets as another."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
