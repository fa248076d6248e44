import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from detmix.mixing.join import SHARED_BYTES, as_alike, copied, join, join_alike, split


def boxes(rows, box_format):
    return tv_tensors.BoundingBoxes(torch.tensor(rows).reshape(-1, 4), format=box_format, canvas_size=(9, 9))


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


def test_masks_made_without_thought_leave_the_others_as_they_are():
    masks = torch.ones(1, 2, 3)
    assert torch.equal(join("masks", torch.tensor([]), masks, (2, 3)), masks)
    assert torch.equal(join("masks", masks, torch.tensor([]), (2, 3)), masks)


def test_masks_of_the_size_of_the_canvas_are_copied():
    masks = torch.ones(1, 2, 3)
    join("masks", masks, torch.zeros(0, 2, 3), (2, 3)).zero_()
    assert masks.all()


XYXY = boxes([1.0, 1, 2, 2], "XYXY")
POINTS = tv_tensors.KeyPoints(torch.zeros(1, 3, 2), canvas_size=(4, 6))


@pytest.mark.parametrize("value", [torch.zeros(1), torch.zeros(1, 4), XYXY, POINTS])
def test_tensors_of_one_kind_are_alike_whatever_their_number_of_entries(value):
    other = tv_tensors.wrap(value[:0], like=value) if isinstance(value, tv_tensors.TVTensor) else value[:0]
    tensors = as_alike("area", [value, other], [1, 0])
    assert [type(tensor) for tensor in tensors] == [torch.Tensor] * 2
    assert torch.equal(tensors[0], value)


@pytest.mark.parametrize(
    "values",
    [
        [torch.zeros(1), torch.zeros(1, dtype=torch.float64)],
        [torch.zeros(1), torch.zeros(1, device="meta")],
        [torch.zeros(1), torch.zeros(1, requires_grad=True)],
        [torch.zeros(1), torch.zeros(1, 1)],
        [torch.zeros(1), torch.zeros(2)],
        [torch.zeros(1), torch.tensor(0.0)],
        [torch.zeros(1), None],
        [torch.zeros(1), [0.0]],
        [[0.0], [0.0]],
        [XYXY, boxes([1.0, 1, 2, 2], "XYWH")],
        [XYXY, torch.zeros(1, 4)],
        [tv_tensors.Mask(torch.zeros(1, 2, 3)), tv_tensors.Mask(torch.zeros(1, 2, 3))],
        [torch.zeros(1, 2).to_sparse(), torch.zeros(1, 2).to_sparse()],
    ],
)
def test_values_that_differ_are_not_alike(values):
    assert as_alike("area", values, [1, 1]) is None
    assert as_alike("area", values[::-1], [1, 1]) is None


def test_masks_are_not_alike():
    assert as_alike("masks", [torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)], [1, 1]) is None


@pytest.mark.parametrize("numel", [SHARED_BYTES // 12, SHARED_BYTES // 12 + 1])
def test_tensors_are_joined_as_said_up_to_the_largest_shared_one_and_beyond(numel):
    tensors = [torch.rand(1, numel), torch.rand(0, numel), torch.rand(1, numel)]
    first, second = join_alike(tensors, [[0, 2], [1, 0]], [2, 1])
    assert torch.equal(first, torch.cat([tensors[0], tensors[2]]))
    assert torch.equal(second, tensors[0])
    is_shared = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert is_shared == (numel == SHARED_BYTES // 12)


def test_parts_of_a_tensor_change_apart_from_each_other():
    tensor = torch.ones(3, requires_grad=True)
    first, second = split(tensor * 2, [1, 2])
    loss = (second**2).sum()
    first.zero_()
    loss.backward()
    assert tensor.grad.tolist() == [0, 8, 8]
    assert second.tolist() == [2, 2]


@pytest.mark.parametrize("value", [torch.ones(2), XYXY, np.ones(2), [1.0, 1.0]])
def test_a_copy_is_of_its_type_and_changes_alone(value):
    copy = copied(value)
    assert type(copy) is type(value)
    copy[0] = 0
    assert value[0] is not copy[0]
    assert all(np.ravel(value[0]))
