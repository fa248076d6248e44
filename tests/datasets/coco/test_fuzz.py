"""Thousands of annotation files with random mistakes: each is trained on whole, or refused by name."""

import copy
import json
import math
import random
import re
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.models.detection import FCOS
from torchvision.transforms.v2 import functional as TF

import detmix
from detmix.datasets.coco.check import check_folder
from detmix.datasets.coco.defects import KINDS
from detmix.datasets.coco.folder import CocoFolder
from detmix.targets import check_batch
from tests.datasets.coco.defective import picture
from tests.losses.tiny import Backbone, anchors

FILE = "mutated.json"
LIBRARY = Path(detmix.__file__).parent
SIZES = ((16, 24), (20, 20), (24, 16), (16, 24))
BLOCK, BLOCKS = 100, 20
TRAINED_EVERY = 10  # of those that can be mixed, one in so many takes a step as well


def compressed(height, width):
    pixels = np.zeros((height, width), np.uint8, order="F")
    pixels[3:9, 4:11] = 1
    code = coco_mask.encode(pixels)
    return {"size": code["size"], "counts": code["counts"].decode()}


def make_content():
    """Images 1 to 4, the last without objects; polygons, both kinds of run-length code, keypoints, one crowd."""
    images = [{"id": n, "file_name": f"{n}.png", "height": h, "width": w} for n, (h, w) in enumerate(SIZES, 1)]
    triangle = [2, 2, 12, 2, 7, 10]
    masks = [[triangle], compressed(16, 24), {"size": [20, 20], "counts": [150, 40, 210]}]
    masks += [[[1, 1, 9, 1, 9, 9, 1.5, 9]], [triangle, [1, 1, 3, 1, 3, 3]], compressed(24, 16)]
    annotations = [
        {
            "id": 100 + n,
            "image_id": 1 + n // 2,
            "category_id": 3 * (n % 3) + 1,
            "bbox": [1.5 * n, 2, 9.25, 8],
            "area": 40.5,
            "iscrowd": int(n == 3),
            "segmentation": mask,
            "keypoints": [3, 4, 2, 5, 6.5, 1],
        }
        for n, mask in enumerate(masks)
    ]
    categories = [{"id": 3 * n + 1, "name": f"class {n}", "keypoints": ["head", "tail"]} for n in range(3)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


# One mistake. Each takes a source of random numbers and changes the content.

VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    100,
    4,
    2**31,
    2**63,
    -(2**63),
    10**30,
    10**400,
    0.0,
    -0.0,
    0.5,
    1e-9,
    5e-7,
]
VALUES += [1e-4, 1e5, 1e29, 1e31, 1e308, math.nan, math.inf, -math.inf, "", "1", "a", "\0", "\ud800", "é", [], [[]], {}]
VALUES += [
    [None],
    [1],
    [1, 2],
    [0, 0, 0, 0],
    [1, 2, 3, 4],
    [1, 2, 2, 3, 4, 1],
    [[1, 2, 3, 4, 5, 6]],
    {"id": 1},
    "1.png",
]
NAMES = [
    "../1.png",
    "/etc/passwd",
    "C:\\1.png",
    "..\\1.png",
    "5.png",
    "1.png/",
    "./1.png",
    "a/../1.png",
    "1.PNG",
    ".",
    "/",
]
NAMES += ["x" * 300, "images/1.png", "\n", "~/1.png", "file:///1.png", "1.png\0.jpg", "\\\\host\\1.png"]


def places(content):
    """Every key or index in the content, with what holds it."""
    found, stack = [], [content]
    while stack:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        found += [(holder, key) for key in keys]
        stack += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return found


def delete(rng, content):
    holder, key = rng.choice(places(content))
    del holder[key]


def replace(rng, content):
    holder, key = rng.choice(places(content))
    holder[key] = copy.deepcopy(rng.choice(VALUES))


def insert(rng, content):
    lists = [holder for holder, key in places(content) if isinstance(holder, list)]
    if lists:
        holder = rng.choice(lists)
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice(VALUES)))


def repeat(rng, content):
    holder, key = rng.choice(places(content))
    if isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))


def swap(rng, content):
    (one, key), (other, name) = rng.choices(places(content), k=2)
    one[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(one[key])


def scale(rng, content):
    numbers = [(holder, key) for holder, key in places(content) if type(holder[key]) in (int, float)]
    if numbers:
        holder, key = rng.choice(numbers)
        holder[key] *= rng.choice([-1, 0, 0.5, 2, 10, 1e-7, 1e7, 1e300])


def of_annotations(change):
    def mutate(rng, content):
        records = content.get("annotations")
        if isinstance(records, list) and records and isinstance(record := rng.choice(records), dict):
            change(rng, record)

    return mutate


@of_annotations
def box(rng, record):
    record["bbox"] = [rng.choice([rng.uniform(-30, 40), rng.randrange(-5, 30), 1e-6, -1e-6, 0]) for _ in range(4)]


@of_annotations
def thin_box(rng, record):
    record["bbox"] = [rng.uniform(0, 14), rng.uniform(0, 14), 10 ** rng.uniform(-8, 0), 10 ** rng.uniform(-8, 0)]


@of_annotations
def polygon(rng, record):
    record["segmentation"] = [[rng.uniform(-9, 40) for _ in range(rng.randrange(12))] for _ in range(rng.randrange(3))]


@of_annotations
def code(rng, record):
    size = list(rng.choice(SIZES))
    text = "".join(chr(rng.randrange(40, 115)) for _ in range(rng.randrange(9)))
    runs = [rng.randrange(-5, 300) for _ in range(rng.randrange(5))]
    full = [rng.randrange(200)]
    record["segmentation"] = {"size": size, "counts": rng.choice([text, runs, [*full, math.prod(size) - full[0]]])}


@of_annotations
def points(rng, record):
    record["keypoints"] = [rng.uniform(-9, 40) for _ in range(rng.randrange(9))]


@of_annotations
def reference(rng, record):
    record[rng.choice(["id", "image_id", "category_id"])] = rng.randrange(-1, 12)


@of_annotations
def crowd(rng, record):
    record["iscrowd"] = rng.choice([0, 1, True, 2, -1, "1", None])


def file_name(rng, content):
    records = content.get("images")
    if isinstance(records, list) and records and isinstance(record := rng.choice(records), dict):
        record["file_name"] = rng.choice(NAMES)


CONTENT = [delete, replace, replace, insert, repeat, swap, scale, box, box, thin_box, polygon, code, points, reference]
CONTENT += [crowd, file_name]


# One mistake of the bytes.


def cut(rng, data):
    return data[: rng.randrange(len(data))]


def flip(rng, data):
    at = rng.randrange(len(data))
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def sprinkle(rng, data):
    at = rng.randrange(len(data))
    return (
        data[:at]
        + rng.choice([b"\xff", b"\xed\xa0\x80", b"\0", b"}", b"]", b",", b"-", b"NaN", b"\\", b"9" * 5000])
        + data[at:]
    )


def nest(rng, data):
    return b"[" * 50_000 + data


def mark(rng, data):
    return b"\xef\xbb\xbf" + data


def widen(rng, data):
    return data.decode().encode("utf-16")


def table_again(rng, data):
    return data[:-1] + b', "annotations": []}'


BYTES = [cut, flip, flip, flip, sprinkle, sprinkle, nest, mark, widen, table_again]


def mutate(seed):
    """The bytes of an annotations file with one to three mistakes."""
    rng, content = random.Random(seed), make_content()
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if content:
            rng.choice(CONTENT)(rng, content)
    data = json.dumps(content).encode()
    return rng.choice(BYTES)(rng, data) if rng.random() < 0.15 else data


# What becomes of it.


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    (root / "images").mkdir()
    for n, size in enumerate(SIZES, 1):
        picture(n, size).save(root / "images" / f"{n}.png")
    return root


def train(root, seed, step):
    """The number of annotations that were trained on."""
    dataset = CocoFolder(root, FILE, crowd=seed % 2 == 0)
    samples = [*dataset]
    objects = sum(len(target["boxes"]) for _, target in samples)
    if not samples:
        return objects
    torch.manual_seed(seed)
    images, targets = map(list, zip(*samples, strict=True))
    check_batch(images, targets, num_classes=dataset.num_classes)
    images, targets = detmix.MixUp()(images, targets)
    check_batch(images, targets, num_classes=dataset.num_classes)
    if step:
        sizes = {"min_size": 37, "max_size": 61}  # so that boxes are scaled by what has no exact float
        generator = anchors(((8,), (16,)), (1.0,))
        detector = detmix.weight_losses(FCOS(Backbone(), dataset.num_classes, anchor_generator=generator, **sizes))
        losses = detector.train()([TF.to_dtype(image, torch.float32, scale=True) for image in images], targets)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values()), losses
    return objects


def outcome(root, seed, step):
    data = mutate(seed)
    (root / FILE).write_bytes(data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        try:
            objects = train(root, seed, step)
        except (ValueError, FileNotFoundError) as error:
            refusal = error
        else:
            refusal = None
    if refusal:
        last = Path(traceback.extract_tb(refusal.__traceback__)[-1].filename)
        assert last.is_relative_to(LIBRARY / "datasets"), f"raised in {last}"
        assert str(root / FILE) in str(refusal)
        assert any(message in str(refusal) for message in described(root)), str(refusal)
        return "refused"
    records = json.loads(data.decode("utf-8-sig"))["annotations"]
    expected = len(records) if seed % 2 == 0 else sum(not record.get("iscrowd") for record in records)
    told = [re.search(r"of (\d+) boxes, (\d+) are left out", str(warning.message)) for warning in said]
    assert objects == expected - sum(int(found[2]) for found in told)
    check = check_folder(root, FILE)
    assert all(KINDS[defect.kind].training != "refuses" or on_crowd_only(defect, records) for defect in check.defects)
    if seed % 2 == 0:
        assert np.count_nonzero(check.lost["annotations"]) == expected - objects
    return "trained"


def described(root):
    """The errors as the checker says them, or why it could not look for them."""
    try:
        return [defect.message for defect in check_folder(root, FILE).errors]
    except ValueError as error:
        return [str(error)]


def on_crowd_only(defect, records):
    """Crowd boxes, which training leaves out, are checked all the same."""
    return all(records[row].get("iscrowd") for row in defect.rows)


def run(root, block):
    outcomes = []
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        try:
            outcomes.append(outcome(root, seed, step=seed % TRAINED_EVERY == 0))
        except Exception as error:
            error.add_note(f"seed {seed}: {mutate(seed)[:3000]!r}")
            raise
    return outcomes


@pytest.mark.parametrize(
    "block", [pytest.param(n, marks=pytest.mark.slow if n >= BLOCKS // 2 else ()) for n in range(BLOCKS)]
)
def test_a_mutated_file_is_trained_on_or_refused_by_name(root, block):
    outcomes = run(root, block)
    assert min(map(outcomes.count, ("trained", "refused"))) >= BLOCK // 10


def test_the_file_without_mistakes_is_trained_on(root):
    (root / FILE).write_text(json.dumps(make_content()))
    assert check_folder(root, FILE).defects == []
    assert train(root, 0, step=True) == 6
