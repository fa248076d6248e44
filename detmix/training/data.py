"""The Lightning data module: COCO-format folders, Albumentations on the CPU, mixup on the device."""

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
"""What `collate` makes: images ``(3, H_i, W_i)`` and as many targets."""


class DetectionData(L.LightningDataModule):
    """A COCO-format folder, or the embedded set of drawn shapes.

    Images are mixed in pairs within the batch, as uint8, after they have reached the device, so each is decoded once.

    What a step is trained on, and every draw in it, depends on the seed, the epoch, the batch and the rank alone. So a
    run goes on from the middle of an epoch as if it had not been interrupted, with any number of workers. Processes
    that train together share out the training images, and mix theirs differently; each validates whole batches of its
    own, and no image is seen twice.

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
        seed: Of order and draws; on the command line that of ``seed_everything``.
        unreadable: What to do about an image that cannot be decoded: ``raise``, which stops the run by its name, or
            ``skip`` it, with a warning and the count at the end.

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
        self.skipped: set[tuple[str, int]] = set()  # split and image id: those of one split may be another's too
        # Where to begin, an epoch and a batch of it: Lightning asks for the loader before it restores its own progress.
        self._position = (0, 0)
        self._epoch = 0  # of the last batch
        self._images_a_step = 0

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
        return CocoFolder(root, *self.splits[split], unreadable=self.unreadable, **options)

    def setup(self, stage: str) -> None:
        """Read and check both splits before anything is trained."""
        if self.train_set.class_names != self.val_set.class_names:
            raise ValueError(
                f"{self.splits['train'][0]} and {self.splits['val'][0]} must have the same categories, but have "
                f"{self.train_set.class_names} and {self.val_set.class_names}."
            )

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled batches of this process; the last, smaller one is left out.

        Raises:
            ValueError: if there are not enough images, or a run that stopped within an epoch is to go on with others.
        """
        self.check_batch_size()
        count, rank = self._processes()
        (epoch, start), self._position = self._position, (0, 0)
        if start and self._images_a_step != self.batch_size * count:
            raise ValueError(
                f"batch_size times processes must be {self._images_a_step}, as it was, since the checkpoint is one of "
                f"the middle of an epoch, but it is {self.batch_size * count}."
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
                f"{' of each process' if count > 1 else ''}, but is {self.batch_size}."
            )

    def val_dataloader(self) -> DataLoader[Sample]:
        """Every validation image once, in order, in the batches that one process would have."""
        count, rank = self._processes()
        batches = list(BatchSampler(range(len(self.val_set)), self.batch_size, drop_last=False))
        share = np.array_split(np.arange(len(batches)), count)[rank]
        # Lightning would leave out the validation, and with it AP's exchange, in a process that has no batch.
        return self._loader(self.val_set, [batches[i] for i in share] or [[]])

    def _processes(self) -> tuple[int, int]:
        """How many train together, and which of them this is."""
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
            generator=torch.Generator(),  # so that starting workers draws from none that training uses
        )

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs of the data: the seed, where to begin, and where the mixup stands."""
        trainer: Any = self.trainer
        progress = trainer.fit_loop
        epoch, batch = progress.epoch_progress.current.processed, progress.epoch_loop.batch_progress.current.ready
        if epoch == self._epoch and batch == trainer.num_training_batches:  # what is left of it is a validation
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
        """Go on where `state_dict` was called."""
        self.seed, self._images_a_step = state_dict["seed"], state_dict["images_a_step"]
        self.skipped = set(map(tuple, state_dict["skipped"]))
        self._position = state_dict["epoch"], state_dict["batch"]
        if self.mixup is not None and state_dict["mixup"] is not None:
            self.mixup.set_extra_state(state_dict["mixup"])

    def on_before_batch_transfer(self, batch: LoadedBatch, dataloader_idx: int) -> LoadedBatch:
        """Check a batch, and seed what is drawn for it, before it leaves the CPU, where no look at it waits."""
        batch = self.drop_unreadable(batch, "train" if self.trainer and self.trainer.training else "val")
        check_batch(*batch, num_classes=self.num_classes)
        if self.trainer and self.trainer.training:
            loop: Any = self.trainer.fit_loop.epoch_loop
            self._epoch = self.trainer.current_epoch
            set_seed(self.seed, self._epoch, loop.batch_progress.current.ready, self.trainer.global_rank)
        return batch

    def drop_unreadable(self, batch: LoadedBatch, split: str) -> LoadedBatch:
        """The samples of a split's batch whose images could be decoded; the others are named once, and counted."""
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
    # Ctrl-C reaches all processes of a terminal; the one that trains writes a checkpoint before it ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate(samples: Sequence[Sample]) -> LoadedBatch:
    """Images of any sizes as a list, and their targets as another."""
    return [image for image, _ in samples], [target for _, target in samples]


def as_seed(seed: bool | int) -> int:
    """Return the seed of the data for a ``seed_everything``: ``True`` asks for any, which the checkpoint then keeps."""
    return random.randrange(2**32) if seed is True else int(seed)
