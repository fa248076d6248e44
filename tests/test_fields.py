import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from detmix.fields import is_list, join, keys_per_box, take


def boxes(rows, box_format):
    return tv_tensors.BoundingBoxes(torch.tensor(rows).reshape(-1, 4), format=box_format, canvas_size=(9, 9))


@pytest.mark.parametrize("value", [[], (), [1], np.zeros(0), np.zeros((2, 3)), torch.zeros(0), torch.zeros(1, 2)])
def test_what_has_entries_can_belong_to_boxes(value):
    assert is_list(value)
    assert keys_per_box({"area": value, "size": value}) == {"area"}


@pytest.mark.parametrize("value", [17, 1.5, "photo", None, {"a": 1}, torch.tensor(3), np.array(3)])
def test_what_has_none_belongs_to_the_image(value):
    assert not is_list(value)
    assert keys_per_box({"area": value}) == set()


def test_entries_are_taken_in_the_order_of_the_rows():
    rows = torch.tensor([2, 0])
    assert take(["a", "b", "c"], rows) == take(("a", "b", "c"), rows) == ["c", "a"]
    array = take(np.array([5.0, 6.0, 7.0]), rows)
    assert isinstance(array, np.ndarray)
    assert array.tolist() == [7.0, 5.0]
    taken = take(boxes([1.0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6], "XYWH"), rows)
    assert taken.format == tv_tensors.BoundingBoxFormat.XYWH
    assert taken[:, 0].tolist() == [5, 1]


def test_a_first_without_boxes_decides_their_format_all_the_same():
    joined = join("boxes", boxes([], "CXCYWH"), boxes([0.0, 0, 4, 2], "XYXY"), (9, 9))
    assert joined.format == tv_tensors.BoundingBoxFormat.CXCYWH
    assert joined.tolist() == [[2, 1, 4, 2]]


def test_masks_of_the_users_own_are_padded_by_their_type():
    parts = [tv_tensors.Mask(torch.ones(1, *size)) for size in ((2, 3), (4, 1))]
    joined = join("amodal", *parts, (4, 3))
    assert joined.shape == (2, 4, 3)
    assert joined.sum(dim=(1, 2)).tolist() == [6, 4]


def test_a_list_becomes_a_tensor_on_the_device_of_the_other():
    assert join("iscrowd", torch.zeros(1, device="meta"), [1, 0], (4, 3)).device.type == "meta"
    assert join("iscrowd", [1, 0], torch.zeros(1), (4, 3)).tolist() == [1, 0, 0]
