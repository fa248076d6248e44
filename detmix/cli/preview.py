"""The command that draws mixed training samples without training."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from jsonargparse.typing import PositiveInt
from torch import Tensor

from detmix.cli.config_parser import ConfigParser
from detmix.cli.parser import run_command
from detmix.mixing.plan import Mix
from detmix.mixing.transform import MixUp
from detmix.targets import Target
from detmix.training.callbacks import write_samples
from detmix.training.data import DetectionData, LoadedBatch, as_seed, collate
from detmix.training.records import read_record, write_record

DESCRIPTION = """\
Draw a training batch as the data section of a config mixes it, and record how it was mixed. Neither the model nor the
trainer is built; their sections of the config are ignored."""

IGNORED = ("trainer", "model", "checkpoint", "last", "pictures", "run_dir", "ckpt_path", "weights_only")
"""Other keys of the config of a training, or of the config.yaml that a run saves."""


def make_parser(prog: str | None = None) -> ConfigParser:
    """Return the parser of the command line, which takes whole configs of trainings."""
    parser = ConfigParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="Config of a training, in yaml or json.")
    parser.add_argument("--output", default="preview.png", help="PNG file to write, beside a JSON record of its mixes.")
    parser.add_argument("--num_images", type=PositiveInt, default=12, help="Number of samples to mix and draw.")
    parser.add_argument(
        "--replay",
        default=None,
        type=str | None,
        help="JSON record to repeat, of a preview or of a run (pictures/mixed.json). All its samples are mixed and "
        "drawn as it says. A record does not hold the augmentation: the images are mixed as they are on disk.",
    )
    parser.add_argument(
        "--seed_everything", type=bool | int, default=0, help="Seed of the samples and of the mix; true draws one."
    )
    parser.add_lightning_class_args(DetectionData, "data")
    parser.link_arguments("seed_everything", "data.seed", compute_fn=as_seed)
    for name in IGNORED:
        parser.add_argument(f"--{name}", type=dict[str, Any] | Any, default=None, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Draw a batch as the command line says."""
    parser = make_parser(prog)
    return run_command(parser, partial(run, parser), arguments)


def run(parser: ConfigParser, config: Any) -> int:
    """Draw, and return the exit status."""
    if config.seed_everything is not False:
        L.seed_everything(None if config.seed_everything is True else config.seed_everything, workers=True)
    picture = Path(config.output)
    draw(parser.instantiate_classes(config).data, config.num_images, config.replay, picture)
    sys.stdout.write(f"Drew {picture}; {picture.with_suffix('.json')} records the mixes\n")
    return 0


def draw(data: DetectionData, num_images: int, replay: str | None, path: Path) -> None:
    """Mix a batch, draw it, and record it beside the picture."""
    mixup = MixUp(p=0.0) if data.mixup is None else data.mixup
    # The epoch that mixes most, because a schedule may start later or slowly.
    mixup.set_epoch(max(range(mixup.start, mixup.start + max(1, mixup.ramp)), key=mixup.probability))
    batch = _first_batch(data, num_images) if replay is None else _recorded(data, Path(replay))
    images, targets = mixup(*batch)
    write_samples(images, targets, data.class_names, path)
    write_record(targets, path.with_suffix(".json"))


def _first_batch(data: DetectionData, count: int) -> LoadedBatch:
    data.batch_size, data.num_workers = count, 0
    batch = data.drop_unreadable(next(iter(data.train_dataloader())), "train")
    if not batch[0]:
        raise ValueError(f"none of the {count} images of the batch can be read.")
    return batch


def _recorded(data: DetectionData, record: Path) -> tuple[list[Tensor], list[Target], list[Mix]]:
    image_ids, plan = read_record(record)
    data.augment = None
    dataset = data.train_set
    known = dataset.image_ids  # sorted
    for i, image_id in enumerate(image_ids):
        if image_id not in known:
            raise ValueError(
                f"image_id of sample {i} of {record} is {image_id}, which is not one of the {len(known)} images of "
                f"{dataset.annotations_file}."
            )
    images, targets = collate([dataset[index] for index in np.searchsorted(known, image_ids)])
    for image, target in zip(images, targets, strict=True):
        if image is None:  # partners in the plan are places in the batch, so no sample can be left out
            raise ValueError(target["error"])
    return images, targets, plan


if __name__ == "__main__":
    sys.exit(main())
