import pytest
import torch
from PIL import ImageColor
from torchvision import tv_tensors

from detmix.visualize import SOURCE_COLORS, draw_grid, draw_sample


def color_at(picture, x, y):
    return tuple(picture[:, y, x].tolist())


def test_boxes_have_the_colour_of_the_image_they_came_from():
    target = {
        "boxes": torch.tensor([[10.0, 10.0, 40.0, 60.0], [60.0, 10.0, 90.0, 60.0]]),
        "labels": torch.tensor([1, 2]),
        "source": torch.tensor([0, 1]),
        "weights": torch.tensor([0.75, 0.25]),
    }
    picture = draw_sample(torch.zeros(3, 100, 100), target, ["cat", "dog"], size=200)
    assert color_at(picture, 20, 80) == ImageColor.getrgb(SOURCE_COLORS[0])
    assert color_at(picture, 120, 80) == ImageColor.getrgb(SOURCE_COLORS[1])
    assert color_at(picture, 190, 190) == (0, 0, 0)


@pytest.mark.parametrize(
    ("box_format", "columns"),
    [
        ("XYWH", [10.0, 20.0, 40.0, 30.0]),
        ("CXCYWH", [30.0, 35.0, 40.0, 30.0]),
        ("CXCYWHR", [30.0, 35.0, 40.0, 30.0, 0.0]),
        ("XYXYXYXY", [10.0, 20.0, 50.0, 20.0, 50.0, 50.0, 10.0, 50.0]),
    ],
)
def test_boxes_of_any_format_are_drawn_where_they_are(box_format, columns):
    boxes = tv_tensors.BoundingBoxes([columns], format=box_format, canvas_size=(100, 100))
    picture = draw_sample(torch.zeros(3, 100, 100), {"boxes": boxes}, size=200)
    rows, columns = (picture.sum(0) > 0).nonzero().T
    edges = [columns.min(), rows.min(), columns.max(), rows.max()]
    assert all(abs(int(edge) - 2 * place) <= 1 for edge, place in zip(edges, (10, 20, 50, 50), strict=True))


def test_the_label_says_class_and_weight():
    box = {"boxes": torch.tensor([[10.0, 10.0, 90.0, 90.0]]), "labels": torch.tensor([1])}
    draw = lambda **more: draw_sample(torch.zeros(3, 100, 100), {**box, **more}, ["cat"])  # noqa: E731
    pictures = [draw(), draw(weights=torch.tensor([0.3])), draw(weights=torch.tensor([0.8]))]
    assert not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[1], pictures[2])
    names = [draw_sample(torch.zeros(3, 100, 100), box, names) for names in (["cat", "dog"], ["dog", "cat"])]
    assert torch.equal(pictures[0], names[0])
    assert not torch.equal(pictures[0], names[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_kind_are_drawn_and_left_alone(dtype, channels):
    image = (torch.rand(channels, 30, 50) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    kept = image.clone()
    picture = draw_sample(image, {"boxes": torch.zeros(0, 4)}, size=100)
    assert picture.shape == (3, 60, 100)
    assert picture.dtype == torch.uint8
    expected = image.float().mean() * (1 if dtype == torch.uint8 else 255)
    assert abs(picture.float().mean() - expected) < 2
    assert torch.equal(image, kept)


def test_a_grid_holds_every_picture_at_the_top_left_of_its_cell():
    pictures = [torch.full((3, 10 + i, 20 - i), 100 + i, dtype=torch.uint8) for i in range(5)]
    grid = draw_grid(pictures, columns=3)
    assert grid.shape == (3, 2 * (14 + 2) + 2, 3 * (20 + 2) + 2)
    for i, picture in enumerate(pictures):
        y, x = 2 + (i // 3) * 16, 2 + (i % 3) * 22
        assert torch.equal(grid[:, y : y + picture.shape[1], x : x + picture.shape[2]], picture)
