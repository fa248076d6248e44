import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2

from detmix import MixUp, MixUpDataset
from tests.conftest import make_sample


class Samples(torch.utils.data.Dataset):
    """Samples of several sizes and box counts, made anew for each index."""

    def __init__(self, length=12):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return make_sample(index % 3, (8 + index % 4, 12), seed=index)


def plan(dataset, workers=0, **options):
    loader = DataLoader(dataset, num_workers=workers, collate_fn=list, **options)
    return [(sample[1]["image_id"], sample[1]["partner"], sample[1]["lam"]) for batch in loader for sample in batch]


def test_every_sample_is_mixed_with_another_one_of_the_dataset():
    dataset = MixUpDataset(Samples(), seed=0)
    assert len(dataset) == 12
    for index in range(12):
        image, target = dataset[index]
        partner, lam = target["partner"], target["lam"]
        assert partner != index
        expected = MixUp().mix(Samples()[index], Samples()[partner], lam, partner=partner)
        assert torch.equal(image, expected[0])
        assert torch.equal(target["weights"], expected[1]["weights"])


def test_partners_come_from_the_whole_dataset():
    dataset = MixUpDataset(Samples(4))
    assert {dataset[1][1]["partner"] for _ in range(80)} == {0, 2, 3}


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_seed_gives_the_same_mixes_for_any_number_of_workers_and_others_each_epoch(context):
    dataset = MixUpDataset(Samples(), seed=3)
    loader = DataLoader(
        dataset,
        num_workers=2,
        collate_fn=list,
        persistent_workers=True,
        multiprocessing_context=context,
        prefetch_factor=1,
    )
    plans = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        alone = plan(dataset)
        shared = [(s[1]["image_id"], s[1]["partner"], s[1]["lam"]) for batch in loader for s in batch]
        assert shared == alone
        plans.append(alone)
    assert all(a != b for a, b in zip(*plans, strict=True))
    assert plan(MixUpDataset(Samples(), seed=4)) != plan(MixUpDataset(Samples(), seed=3))


def test_without_a_seed_the_generator_of_torch_decides():
    plans = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        plans.append(plan(MixUpDataset(Samples())))
    assert plans[0] == plans[1] != plans[2]


def test_a_dataset_of_one_sample_stays_unmixed():
    _, target = MixUpDataset(Samples(1))[0]
    assert target["partner"] == -1
    assert "weights" in target


def test_indices_count_from_the_end_and_stop_at_it():
    dataset = MixUpDataset(Samples(), MixUp(p=0.0))
    assert dataset[-1][1]["image_id"] == 11
    with pytest.raises(IndexError, match="index 12 is outside a dataset of 12 samples"):
        dataset[12]
    assert len(list(dataset)) == 12


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools 2.0.11 on numpy 2
def test_coco_detection_of_torchvision_mixes(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "width": 16 - i, "height": 12 + i} for i in range(4)]
    for image in images:
        pixels = np.full((image["height"], image["width"], 3), 60 * image["id"], dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / image["file_name"])
    annotations = [
        {"id": i, "image_id": i // 2, "category_id": 7, "bbox": [1, 2, 3 + i, 4], "area": 12, "iscrowd": 0}
        | {"segmentation": [[1, 2, 4 + i, 2, 4 + i, 6, 1, 6]]}
        for i in range(8)
    ]
    file = tmp_path / "instances.json"
    file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "cat"}]})
    )
    keys = ["image_id", "boxes", "labels", "masks", "area", "iscrowd"]
    wrapped = wrap_dataset_for_transforms_v2(CocoDetection(str(tmp_path), str(file)), target_keys=keys)
    image, target = MixUpDataset(wrapped, seed=0)[1]
    size = max(13, 12 + target["partner"]), max(15, 16 - target["partner"])
    assert image.shape == (3, *size)
    assert target["masks"].shape == (4, *size)
    assert target["labels"].tolist() == [7] * 4
    assert len(target["area"]) == len(target["iscrowd"]) == 4
    level = target["lam"] * 60 + (1 - target["lam"]) * 60 * target["partner"]
    assert (image[:, :12, :12].float() - level).abs().max() <= 0.51


def test_what_gives_no_pairs_is_named():
    with pytest.raises(TypeError, match=r"have a length and give samples by index, but .*generator does not"):
        MixUpDataset(sample for sample in [])
    with pytest.raises(TypeError, match=r"sample 0 of list must be an \(image, target\) pair.*it is a Tensor"):
        MixUpDataset([torch.zeros(3, 4, 4)])[0]
    with pytest.raises(TypeError, match=r"sample 0 of list must be .* it is a tuple"):
        MixUpDataset([(torch.zeros(3, 4, 4), {"boxes": torch.zeros(0, 4)}, "more")])[0]

    class Endless:
        def __getitem__(self, index):
            return make_sample()

    with pytest.raises(TypeError, match="Endless does not"):
        MixUpDataset(Endless())
