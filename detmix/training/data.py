"""The Lightning data module: folders in COCO format, Albumentations on the CPU, mixup on the device."""

import random
import signal
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import albumentations as A
import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from torchvision.transforms.v2 import functional as TF

from detmix.albumentations import AlbumentationsTransform
from detmix.datasets.coco.folder import CocoFolder
from detmix.datasets.shapes import draw_shapes
from detmix.mixing.transform import MixUp
from detmix.targets import Sample, Target, check_batch
from detmix.training.sampling import EpochBatchSampler, SeededDataset, set_seed

LoadedBatch = tuple[list[Tensor], list[Target]]
"""What `collate` returns: images ``(3, H_i, W_i)`` and as many targets."""


class DetectionData(L.LightningDataModule):
    """Load a folder in COCO format, or the embedded dataset of drawn shapes.

    Images are mixed in pairs within the batch, as uint8, on the device. Each image is decoded once.

    The samples of a step and its random numbers depend only on the seed, the epoch, the batch and the rank. A run
    therefore resumes in the middle of an epoch as if it had not been interrupted, with any number of workers.
    Processes that train together share the training images and mix theirs differently. In validation each process
    takes whole batches of its own, and no image is seen twice.

    Args:
        root: Dataset folder. If null, shapes are drawn into ``data/shapes``.
        train_annotations: COCO instances or keypoints file of the training split, relative to root.
        val_annotations: COCO instances or keypoints file of the validation split, relative to root.
        train_images: Folder of the training images, relative to root.
        val_images: Folder of the validation images, relative to root.
        batch_size: Images per batch on each device.
        num_workers: Processes that load images for each device.
        augment: Albumentations transforms for training. The detector resizes images itself (``model.options``).
            Validation images are not transformed, so that AP is measured in the pixels of the annotations.
        min_visibility: Smallest share of a box that augmentation must leave inside the image; other boxes are dropped.
        mixup: How to mix, and in which epochs. Null trains on unmixed images.
        seed: Seed of the order and of all random numbers. The command line takes it from ``seed_everything``.
        unreadable: What to do with an image that cannot be decoded. ``raise`` stops the run and names the image.
            ``skip`` warns once and goes on; the skipped images are printed at the end.

    Raises:
        FileNotFoundError: if a file or folder is missing; see `CocoFolder`.
        ValueError: if an argument is out of range, or the dataset has a defect; see `CocoFolder`.
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
        seed: int = 0,
        unreadable: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__()
        if mixup is not None and mixup.inplace:
            raise ValueError("inplace of mixup must be false, since images of different sizes are mixed as a list.")
        for name, number, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, but it is {number}.")
        if not 0 <= min_visibility <= 1:
            raise ValueError(f"min_visibility must be a share in [0, 1], but it is {min_visibility}.")
        self.root = root
        self.splits = {"train": (train_annotations, train_images), "val": (val_annotations, val_images)}
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = AlbumentationsTransform(augment, min_visibility=min_visibility) if augment else None
        self.mixup = mixup
        self.seed = seed
        self.unreadable = unreadable
        self.skipped: set[tuple[str, int]] = set()  # split and image id, as both splits may use the same ids
        # The epoch and batch to start at: Lightning asks for the loader before it restores its own progress.
        self._position = (0, 0)
        self._epoch = 0  # of the last batch
        self._images_a_step = 0

    @cached_property
    def train_set(self) -> CocoFolder:
        """Return the training split, augmented and without crowd boxes."""
        return self._read("train", transforms=self.augment)

    @cached_property
    def val_set(self) -> CocoFolder:
        """Return the validation split, not transformed, with the crowd boxes that COCO evaluation needs."""
        return self._read("val", crowd=True)

    @property
    def num_classes(self) -> int:
        """Return the number of classes of the training split, with the background."""
        return self.train_set.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of classes 1, 2, ... of the training split."""
        return self.train_set.class_names

    def _read(self, split: str, **options: Any) -> CocoFolder:
        root = Path(draw_shapes("data/shapes") if self.root is None else self.root)
        return CocoFolder(root, *self.splits[split], unreadable=self.unreadable, **options)

    def setup(self, stage: str) -> None:
        """Read and check both splits before training starts."""
        if self.train_set.class_names != self.val_set.class_names:
            raise ValueError(
                f"{self.splits['train'][0]} and {self.splits['val'][0]} must have the same categories, but have "
                f"{self.train_set.class_names} and {self.val_set.class_names}."
            )

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return shuffled batches of this process, without a last, smaller one.

        Raises:
            ValueError: if there are not enough images, or if a run that stopped in the middle of an epoch is resumed
                with batches of another size.
        """
        self.check_batch_size()
        count, rank = self._processes()
        (epoch, start), self._position = self._position, (0, 0)
        if start and self._images_a_step != self.batch_size * count:
            raise ValueError(
                f"batch_size times processes must stay {self._images_a_step}, because the checkpoint is from the "
                f"middle of an epoch, but it is {self.batch_size * count}."
            )
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.train_set, count, rank, shuffle=True, seed=self.seed, drop_last=True
        )
        sampler.set_epoch(epoch)
        batches = EpochBatchSampler(sampler, self.batch_size, start)
        return self._loader(SeededDataset(self.train_set, self.seed), batches)

    def check_batch_size(self) -> None:
        """Raise ``ValueError`` if there are too few training images for one batch."""
        count, _ = self._processes()
        if len(self.train_set) < self.batch_size * count:
            raise ValueError(
                f"batch_size must be at most the {len(self.train_set) // count} training images"
                f"{' of each process' if count > 1 else ''}, but it is {self.batch_size}."
            )

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return every validation image once, in order, in the batches that one process would have."""
        count, rank = self._processes()
        batches = list(BatchSampler(range(len(self.val_set)), self.batch_size, drop_last=False))
        share = np.array_split(np.arange(len(batches)), count)[rank]
        # A process without a batch would skip the validation, and the others would wait for it to exchange AP.
        return self._loader(self.val_set, [batches[i] for i in share] or [[]])

    def _processes(self) -> tuple[int, int]:
        """Return how many processes train together, and the rank of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(self, dataset: Any, batches: Any) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),  # of its own, so that starting workers draws no random numbers of the training
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: the seed, the position in the epoch, skipped images and the state of mixup."""
        trainer: Any = self.trainer
        progress = trainer.fit_loop
        epoch, batch = progress.epoch_progress.current.processed, progress.epoch_loop.batch_progress.current.ready
        if epoch == self._epoch and batch == trainer.num_training_batches:  # only a validation is left
            epoch += 1
        return {
            "seed": self.seed,
            "epoch": epoch,
            "batch": batch if epoch == self._epoch else 0,
            "images_a_step": self.batch_size * trainer.world_size,
            "skipped": sorted(self.skipped),
            "mixup": None if self.mixup is None else self.mixup.get_extra_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume where `state_dict` was called."""
        self.seed, self._images_a_step = state_dict["seed"], state_dict["images_a_step"]
        self.skipped = set(map(tuple, state_dict["skipped"]))
        self._position = state_dict["epoch"], state_dict["batch"]
        if self.mixup is not None and state_dict["mixup"] is not None:
            self.mixup.set_extra_state(state_dict["mixup"])

    def on_before_batch_transfer(self, batch: LoadedBatch, dataloader_idx: int) -> LoadedBatch:
        """Check a batch and seed its random numbers on the CPU, where reading values does not wait for the device."""
        batch = self.drop_unreadable(batch, "train" if self.trainer and self.trainer.training else "val")
        check_batch(*batch, num_classes=self.num_classes)
        if self.trainer and self.trainer.training:
            loop: Any = self.trainer.fit_loop.epoch_loop
            self._epoch = self.trainer.current_epoch
            set_seed(self.seed, self._epoch, loop.batch_progress.current.ready, self.trainer.global_rank)
        return batch

    def drop_unreadable(self, batch: LoadedBatch, split: str) -> LoadedBatch:
        """Return the samples of a batch whose images could be decoded; warn once of each other one, and count it."""
        read = []
        for image, target in zip(*batch, strict=True):
            if image is not None:
                read.append((image, target))
            elif (split, target["image_id"]) not in self.skipped:
                self.skipped.add((split, target["image_id"]))
                warnings.warn(f"image {target['image_id']} is skipped: {target['error']}", stacklevel=2)
        return [image for image, _ in read], [target for _, target in read]

    def on_after_batch_transfer(self, batch: LoadedBatch, dataloader_idx: int) -> LoadedBatch:
        """Mix a training batch on its device, then make the images float32 in [0, 1]."""
        images, targets = batch
        if self.mixup and images and self.trainer and self.trainer.training:
            self.mixup.set_epoch(self.trainer.current_epoch)
            images, targets = self.mixup(images, targets)
        return [TF.to_dtype(image, torch.float32, scale=True) for image in images], targets


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches all processes of a terminal; the main process saves a checkpoint before it ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate(samples: Sequence[Sample]) -> LoadedBatch:
    """Return images of any sizes as a list, and their targets as another."""
    return [image for image, _ in samples], [target for _, target in samples]


def as_seed(seed: bool | int) -> int:
    """Return the seed for a ``seed_everything``; ``True`` draws one, and the checkpoint keeps it."""
    return random.randrange(2**32) if seed is True else int(seed)
