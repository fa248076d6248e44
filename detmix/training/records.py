"""Write and read JSON records of how batches were mixed."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detmix.mixing.plan import Mix
from detmix.targets import Target
from detmix.training.files import write_whole


def write_record(targets: Sequence[Target], path: Path) -> None:
    """Record how a batch was mixed, as one JSON object per sample. The file is written whole or not at all.

    Args:
        targets: All mixed targets of the batch, because a partner is an index among them.
        path: JSON file to write.
    """
    ids = [None if (image_id := target.get("image_id")) is None else int(image_id) for target in targets]
    plan = [Mix.of(target) if "lam" in target else Mix() for target in targets]
    # The partner of a MixUpDataset is no index among the targets; it must not end a training.
    partner_ids = [ids[mix.partner] if 0 <= mix.partner < len(ids) else None for mix in plan]
    samples = [
        {"image_id": image_id, "partner_image_id": partner_id, **mix._asdict()}
        for image_id, partner_id, mix in zip(ids, partner_ids, plan, strict=True)
    ]
    text = "[\n" + ",\n".join(f"  {json.dumps(sample)}" for sample in samples) + "\n]\n"
    write_whole(path, lambda file: file.write(text.encode()))


def read_record(path: Path) -> tuple[list[int], list[Mix]]:
    """Read what `write_record` wrote.

    Args:
        path: JSON file to read.

    Returns:
        The image ids of the batch, and its plan.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file holds no record. The message names the sample, the key, its value and what is expected.
    """
    try:
        samples = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid json: {error}.") from error
    if not (isinstance(samples, list) and samples and all(isinstance(sample, dict) for sample in samples)):
        raise ValueError(f"{path} must hold the record of a mixed batch, a list of one object per sample.")
    for i, sample in enumerate(samples):
        _check_record(sample, samples, f"sample {i} of {path}")
    return [sample["image_id"] for sample in samples], [Mix.of(sample) for sample in samples]


def _check_record(sample: dict[str, Any], samples: Sequence[dict[str, Any]], where: str) -> None:
    if missing := [key for key in ("image_id", "partner_image_id", *Mix._fields) if key not in sample]:
        raise ValueError(f"{where} must hold {missing}, but it holds {sorted(sample)}.")
    partner, placement = sample["partner"], sample["placement"]
    is_partner = type(partner) is int and -1 <= partner < len(samples)
    partner_id = samples[partner].get("image_id") if is_partner and partner >= 0 else None
    is_placed = isinstance(placement, list) and len(placement) == 3 and _are_numbers(placement[:1], sys.float_info.max)
    for key, fits, expected in (
        ("image_id", type(sample["image_id"]) is int, "a whole number"),
        ("partner", is_partner, f"the index of one of the {len(samples)} samples, or -1"),
        ("partner_image_id", sample["partner_image_id"] == partner_id, f"{partner_id}, that of its partner"),
        ("lam", _are_numbers([sample["lam"]], 1), "a number in [0, 1]"),
        ("shares", _are_numbers(sample["shares"], 1) and len(sample["shares"]) == 2, "two numbers in [0, 1]"),
        (
            "placement",
            placement is None or (is_placed and placement[0] > 0 and _are_numbers(placement[1:], 1)),
            "null, or a positive number and two in [0, 1]",
        ),
    ):
        if not fits:
            raise ValueError(f"{key} of {where} must be {expected}, but it is {sample[key]!r}.")


def _are_numbers(values: Any, most: float) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) and 0 <= value <= most for value in values)
