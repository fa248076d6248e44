"""torchvision's own datasets as they are, on their own layouts on disk; streams; mixing in a collate_fn."""

import functools
import json
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchvision import datasets, tv_tensors
from torchvision.transforms.v2 import functional as TF

from detmix import MixUp, MixUpDataset
from detmix.datasets.coco.folder import CocoFolder
from tests.conftest import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools 2.0.11 on numpy 2

SIZES = [(24, 32), (20, 40), (36, 28)]  # height, width of image i
BOXES = [[[1, 2, 9, 8], [3, 4, 20, 16]], [[5, 5, 39, 19]], [[0, 0, 4, 6], [7, 9, 27, 35], [2, 2, 10, 12]]]  # XYXY


def save_image(path: Path, index: int) -> None:
    """Image i, of level 60 * i and size i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*SIZES[index % 3], 3), 60 * index, dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path, quality=100)


def xywh(box):
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def coco_detection(root, keys=None):
    """Images 0 to 2, and 3 without annotations; segmentations are polygons, of image 2 run lengths."""
    annotations = []
    for i, boxes in enumerate(BOXES):
        height, width = SIZES[i]
        for x0, y0, x1, y1 in boxes:
            polygon = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            runs = {"size": [height, width], "counts": [height * width - 5, 5]}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + i,
                    "category_id": 10 + len(annotations),
                    "iscrowd": i // 2,
                }
                | {"bbox": xywh((x0, y0, x1, y1)), "area": 7.5 + len(annotations)}
                | {"segmentation": runs if i == 2 else polygon}
            )
    images = [
        {"id": 100 + i, "file_name": f"{i:012}.jpg", "height": SIZES[i % 3][0], "width": SIZES[i % 3][1]}
        for i in range(4)
    ]
    for i, image in enumerate(images):
        save_image(root / "train2017" / image["file_name"], i)
    file = root / "annotations/instances_train2017.json"
    file.parent.mkdir(parents=True)
    categories = [{"id": 10 + k, "name": f"class {k}"} for k in range(6)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return wrap(datasets.CocoDetection(str(root / "train2017"), str(file)), keys)


def voc_detection(root, keys=None):
    """Images 0 to 2 of the classes aeroplane, bicycle and bird."""
    base = root / "VOCdevkit/VOC2012"
    for folder in ("ImageSets/Main", "Annotations"):
        (base / folder).mkdir(parents=True)
    (base / "ImageSets/Main/train.txt").write_text("".join(f"2008_{i:06}\n" for i in range(3)))
    for i, boxes in enumerate(BOXES):
        save_image(base / f"JPEGImages/2008_{i:06}.jpg", i)
        objects = "".join(
            f"<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"
            f"<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>"
            "</object>"
            for name, box in zip(("aeroplane", "bicycle", "bird"), boxes, strict=False)
        )
        height, width = SIZES[i]
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        (base / f"Annotations/2008_{i:06}.xml").write_text(
            f"<annotation><folder>VOC2012</folder><filename>2008_{i:06}.jpg</filename>{size}{objects}</annotation>"
        )
    return wrap(datasets.VOCDetection(str(root), "2012", "train"), keys)


def kitti(root, keys=None, train=True):
    """Images 0 to 2 of the classes Car, Pedestrian and DontCare; those of the test split have no annotations."""
    base = root / "Kitti/raw" / ("training" if train else "testing")
    (base / "label_2").mkdir(parents=True)
    for i, boxes in enumerate(BOXES):
        save_image(base / f"image_2/{i:06}.png", i)
        lines = (
            f"{name} 0.{k} {k} -1.5{i} {box[0]}.0 {box[1]}.0 {box[2]}.0 {box[3]}.0 1.{i} 1.{k} 3.6 -2.7 2 {k}.5 0.{i}\n"
            for k, (name, box) in enumerate(zip(("Car", "Pedestrian", "DontCare"), boxes, strict=False))
        )
        (base / f"label_2/{i:06}.txt").write_text("".join(lines))
    dataset = datasets.Kitti(str(root), train=train)
    order = np.argsort(dataset.images)  # as listed on disk otherwise
    dataset.images = [dataset.images[i] for i in order]
    dataset.targets = [dataset.targets[i] for i in order] if train else []
    return wrap(dataset, keys)


def wider_face(root, keys=None, split="train"):
    """Images 0 to 2; those of the test split have no annotations."""
    base = root / "widerface"
    for folder in ("WIDER_train", "WIDER_val", "WIDER_test", "wider_face_split"):
        (base / folder).mkdir(parents=True)
    names = [f"{i}--Parade/{i}_Parade_marchingband_1_{i}.jpg" for i in range(3)]
    lines = []
    for i, (name, boxes) in enumerate(zip(names, BOXES, strict=True)):
        save_image(base / f"WIDER_{split}/images" / name, i)
        # x, y, width, height, blur, expression, illumination, invalid, occlusion, pose
        rows = [" ".join(map(str, [*xywh(box), k, i, 0, 1, 2, k % 2])) + " " for k, box in enumerate(boxes)]
        lines += [name, str(len(boxes)), *rows] if split == "train" else [name]
    file = "wider_face_train_bbx_gt.txt" if split == "train" else "wider_face_test_filelist.txt"
    (base / "wider_face_split" / file).write_text("\n".join(lines) + "\n")
    return wrap(datasets.WIDERFace(str(root), split), keys)


def celeba(root, target_type):
    """Images 0 to 2 with one box each."""
    base = root / "celeba"
    names = [f"{i:06}.jpg" for i in range(1, 4)]
    for i, name in enumerate(names):
        save_image(base / "img_align_celeba" / name, i)
    faces = [" ".join(map(str, xywh(boxes[0]))) for boxes in BOXES]
    for file, header, rows in (
        ("list_attr_celeba.txt", "3\n5_o_Clock_Shadow Arched_Eyebrows \n", ["-1  1"] * 3),
        ("identity_CelebA.txt", "", ["2880", "2937", "8692"]),
        ("list_bbox_celeba.txt", "3\nimage_id x_1 y_1 width height\n", faces),
        ("list_landmarks_align_celeba.txt", "3\nlefteye_x lefteye_y \n", ["69  109"] * 3),
        ("list_eval_partition.txt", "", ["0"] * 3),
    ):
        (base / file).write_text(header + "".join(f"{name} {row}\n" for name, row in zip(names, rows, strict=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.celeba.check_integrity", lambda path, md5: Path(path).is_file())
        dataset = datasets.CelebA(str(root), "train", target_type)
    return wrap(dataset, None)


def wrap(dataset, keys):
    return datasets.wrap_dataset_for_transforms_v2(dataset, target_keys=keys)


RECORD = {"weights", "source", "lam", "shares", "canvas", "partner", "placement"}
COCO = {"boxes", "labels", "masks", "area", "iscrowd", "bbox", "category_id", "segmentation"}
KITTI = {"boxes", "labels", "bbox", "type", "truncated", "occluded", "alpha", "dimensions", "location", "rotation_y"}
WIDER = {"boxes", "blur", "expression", "illumination", "occlusion", "pose", "invalid"}

CASES = {  # how to make it, which keys hold one entry a box, which one an image
    "coco": (coco_detection, {"boxes", "labels"}, {"image_id"}),
    "coco, all": (functools.partial(coco_detection, keys="all"), COCO, {"image_id"}),
    "coco, masks": (
        functools.partial(coco_detection, keys=["image_id", "boxes", "masks"]),
        {"boxes", "masks"},
        {"image_id"},
    ),
    "voc": (voc_detection, {"boxes", "labels"}, set()),
    "voc, all": (functools.partial(voc_detection, keys="all"), {"boxes", "labels"}, {"annotation"}),
    "kitti": (kitti, {"boxes", "labels"}, set()),
    "kitti, all": (functools.partial(kitti, keys="all"), KITTI, set()),
    "wider": (wider_face, WIDER, set()),
    "wider, boxes": (functools.partial(wider_face, keys=["bbox"]), {"boxes"}, set()),
    "celeba": (functools.partial(celeba, target_type="bbox"), {"boxes"}, set()),
    "celeba, list": (functools.partial(celeba, target_type=["bbox"]), {"boxes"}, set()),
    "celeba, identity": (functools.partial(celeba, target_type=["identity", "bbox"]), {"boxes"}, {"identity"}),
}


def stored(dataset, index):
    """A sample as the dataset gives it, under the keys it has in a mix."""
    image, target = dataset[index]
    if isinstance(dataset, datasets.CelebA):
        target = dict(zip(dataset.target_type, target if isinstance(target, tuple) else [target], strict=True))
    if target and isinstance(target.get("bbox"), tv_tensors.BoundingBoxes):
        target["boxes"] = target.pop("bbox")
    return TF.to_image(image), target or {}


def entries(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


def assert_mixed(mixed, first, second, per_box, per_image):
    """Assert that a sample is the mix of two others, field by field and pixel by pixel."""
    image, target = mixed
    lam = target["lam"]
    size = tuple(max(first[0].shape[i], second[0].shape[i]) for i in (1, 2))
    assert tuple(image.shape[1:]) == target["canvas"] == target["boxes"].canvas_size == size
    for y, x in np.ndindex(size):
        share = sum(
            weight * float(part[0, y, x])
            for part, weight in ((first[0], lam), (second[0], 1 - lam))
            if y < part.shape[1] and x < part.shape[2]
        )
        assert abs(float(image[0, y, x]) - share) <= 0.5 + 1e-4
    assert set(target) == per_box | per_image | RECORD
    counts = [len(part[1].get("boxes", [])) for part in (first, second)]
    assert target["source"].tolist() == [0] * counts[0] + [1] * counts[1]
    assert target["weights"].tolist() == [lam] * counts[0] + [1 - lam] * counts[1]
    for key in per_box - {"masks"}:
        values = [part[1].get(key, []) for part in (first, second)]
        assert entries(target[key]) == [*entries(values[0]), *entries(values[1])], key
        assert isinstance(target[key], torch.Tensor) == any(isinstance(value, torch.Tensor) for value in values), key
    if "masks" in per_box:
        masks = [mask for part in (first, second) for mask in part[1].get("masks", [])]
        assert len(target["masks"]) == len(masks)
        for mask, small in zip(target["masks"], masks, strict=True):
            assert mask.nonzero().tolist() == small.nonzero().tolist()
    for key in per_image:
        assert target[key] == first[1][key]


@pytest.mark.parametrize("case", CASES)
def test_every_field_of_both_samples_is_joined(case, tmp_path):
    make, per_box, per_image = CASES[case]
    dataset = make(tmp_path)
    mixed = MixUpDataset(dataset, MixUp(lam=(0.1, 0.9)))
    for index in [*range(len(dataset))] * 2:
        sample = mixed[index]
        partner = sample[1]["partner"]
        assert partner not in (index, -1)
        assert_mixed(sample, stored(dataset, index), stored(dataset, partner), per_box, per_image)


@pytest.mark.parametrize("keys", [None, "all"])
@pytest.mark.parametrize("split", ["kitti", "wider"])
def test_a_split_without_annotations_is_a_pool(split, keys, tmp_path):
    if split == "kitti":
        dataset, pool = kitti(tmp_path, keys), kitti(tmp_path, keys, train=False)
        per_box = {"boxes", "labels"} if keys is None else KITTI
    else:
        dataset, pool, per_box = wider_face(tmp_path / "a", keys), wider_face(tmp_path / "b", keys, "test"), WIDER
    assert stored(pool, 0)[1] == {}
    mixed = MixUpDataset(dataset, MixUp(lam=(0.1, 0.9), seed=0), pool=pool)
    for index in range(3):
        sample = mixed[index]
        assert_mixed(sample, stored(dataset, index), stored(pool, sample[1]["partner"]), per_box, set())
    mixed = MixUpDataset(pool, MixUp(lam=(0.1, 0.9), seed=0), pool=dataset)
    for index in range(3):
        sample = mixed[index]
        assert_mixed(sample, stored(pool, index), stored(dataset, sample[1]["partner"]), per_box, set())


@pytest.mark.parametrize("order", [1, -1])
def test_lists_of_one_dataset_are_joined_with_tensors_of_another(order, tmp_path):
    keys = ["image_id", "boxes", "labels", "masks", "area", "iscrowd"]
    wrapped = coco_detection(tmp_path, keys)
    folder = CocoFolder(tmp_path, "annotations/instances_train2017.json", "train2017", crowd=True)
    assert isinstance(wrapped[0][1]["area"], list)
    dataset, pool = [wrapped, folder][::order]
    mixed = MixUpDataset(dataset, MixUp(lam=(0.1, 0.9)), pool=pool)
    for index in range(4):
        sample = mixed[index]
        first, second = stored(dataset, index), stored(pool, sample[1]["partner"])
        assert_mixed(sample, first, second, {*keys} - {"image_id"}, {"image_id"})


def test_an_image_without_annotations_has_empty_fields_when_it_is_not_mixed(tmp_path):
    _, target = MixUpDataset(coco_detection(tmp_path), MixUp(p=0.0))[3]
    assert {key: tuple(target[key].shape) for key in ("boxes", "labels", "weights", "source")} == {
        "boxes": (0, 4),
        "labels": (0,),
        "weights": (0,),
        "source": (0,),
    }
    assert (target["image_id"], target["partner"]) == (103, -1)


def test_a_face_list_without_faces_keeps_the_row_of_zeros_that_torchvision_reads(tmp_path):
    wider_face(tmp_path)
    file = tmp_path / "widerface/wider_face_split/wider_face_train_bbx_gt.txt"
    # The true file has such images: no face, and a line all the same.
    file.write_text(file.read_text() + "3--Riot/3_Riot_Riot_3_3.jpg\n0\n0 0 0 0 0 0 0 0 0 0 \n")
    save_image(tmp_path / "widerface/WIDER_train/images/3--Riot/3_Riot_Riot_3_3.jpg", 3)
    dataset = wrap(datasets.WIDERFace(str(tmp_path), "train"), None)
    sample = MixUpDataset(dataset, MixUp(lam=0.25))[3]
    assert sample[1]["boxes"][0].tolist() == [0, 0, 0, 0]
    assert_mixed(sample, stored(dataset, 3), stored(dataset, sample[1]["partner"]), WIDER, set())


@pytest.mark.parametrize("case", CASES)
def test_a_pickled_dataset_gives_the_same_samples(case, tmp_path):
    mixed = MixUpDataset(CASES[case][0](tmp_path), MixUp(seed=0))
    copied = pickle.loads(pickle.dumps(mixed))
    for index in range(len(mixed)):
        assert_same(copied[index], mixed[index])


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])  # one that is spawned imports for seconds
def test_workers_give_what_the_main_process_gives(context, workers, tmp_path):
    mixed = MixUpDataset(kitti(tmp_path, "all"), MixUp(seed=0))
    loader = DataLoader(mixed, num_workers=workers, collate_fn=list, multiprocessing_context=context)
    pairs = zip((sample for batch in loader for sample in batch), (mixed[index] for index in range(3)), strict=True)
    for (image, target), (expected, expected_target) in pairs:
        assert_same(image, expected)
        # The keys come out of a set in torchvision, in another order in another interpreter.
        assert_same(sorted(target.items()), sorted(expected_target.items()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: coco_detection(root)._dataset, "sample 0 of CocoDetection must be .* but it is a list; wrap"),
        (lambda root: kitti(root)._dataset, "sample 0 of Kitti must be .* but it is a list; wrap"),
        (
            functools.partial(celeba, target_type="identity"),
            "sample 0 of WrappedCelebA must be .* it is a Tensor; wrap",
        ),
    ],
)
def test_what_gives_no_boxes_is_named(make, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        MixUpDataset(make(tmp_path))[0]


class Stream(IterableDataset):
    """The samples of a dataset, one after the other, images as tensors."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        for image, target in (self.dataset[index] for index in range(len(self.dataset))):
            yield TF.to_image(image), target


def collate_lists(samples):
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def collate_mixed(samples, mixup):
    images, targets = collate_lists(samples)
    return mixup([TF.to_image(image) for image in images], targets)


def test_the_batches_of_a_stream_are_mixed_each_within_itself(tmp_path):
    dataset = coco_detection(tmp_path, "all")
    mixup = MixUp(lam=(0.1, 0.9))
    for start, batch in zip((0, 2), DataLoader(Stream(dataset), 2, collate_fn=collate_lists), strict=True):
        for i, sample in enumerate(zip(*mixup(*batch), strict=True)):
            assert sample[1]["partner"] == 1 - i
            first, second = stored(dataset, start + i), stored(dataset, start + 1 - i)
            assert_mixed(sample, first, second, COCO, {"image_id"})


def test_a_collate_fn_mixes_in_workers_however_they_start_and_hears_of_epochs(tmp_path):
    dataset = voc_detection(tmp_path)
    lams = []
    for context in ("fork", "spawn"):
        mixup = MixUp(lam=(0.1, 0.9), start=1, seed=0)
        loader = DataLoader(
            torch.utils.data.ConcatDataset([dataset] * 4),
            3,
            num_workers=2,
            collate_fn=functools.partial(collate_mixed, mixup=mixup),
            persistent_workers=True,
            multiprocessing_context=context,
        )
        for epoch in range(3):
            mixup.set_epoch(epoch)
            for images, targets in loader:
                lams += [target["lam"] for target in targets]
                assert {target["partner"] >= 0 for target in targets} == {epoch > 0}
                for i, sample in enumerate(zip(images, targets, strict=True)):
                    if epoch:
                        first, second = stored(dataset, i), stored(dataset, sample[1]["partner"])
                        assert_mixed(sample, first, second, {"boxes", "labels"}, set())
    assert lams[:36] == lams[36:]
    assert len(set(lams[12:36])) == 24
