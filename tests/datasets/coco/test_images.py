"""How the images of a folder are found, looked at and read."""

import io
import json
import pickle

import numpy as np
import PIL.Image
import pytest
import torch

from detmix.datasets.coco import images
from detmix.datasets.coco.folder import CocoFolder
from tests.datasets.coco.written import FILE, SIZE


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGB", "jpg"), ("L", "jpg"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("I;16", "png")]
)
def test_every_colour_mode_becomes_rgb_of_8_bits(content, write, mode, suffix):
    root = write(content)
    ramp = np.tile(np.arange(SIZE[1], dtype=np.uint8) * 8, (SIZE[0], 1))
    picture = (
        PIL.Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else PIL.Image.fromarray(ramp).convert(mode)
    )
    content["images"][0]["file_name"] = f"other.{suffix}"
    (root / "annotations" / FILE).write_text(json.dumps(content))
    picture.save(root / "images" / f"other.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
    image, _ = CocoFolder(root)[0]
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, *SIZE))
    assert (image.int() - torch.from_numpy(ramp).int()).abs().max() <= 2  # JPEG rounds


def test_missing_images_are_named_and_counted(content, write):
    root = write(content)
    for number in (30, 50):
        (root / "images" / f"{number}.png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"30.png is missing, which .*{FILE} lists; 1 more of its 4 images"):
        CocoFolder(root)
    CocoFolder(root, check_files=False)


def test_images_of_another_size_are_named(content, write):
    root = write(content)
    PIL.Image.new("RGB", (25, 20)).save(root / "images" / "40.png")
    with pytest.raises(ValueError, match=rf"40.png is 20 high and 25 wide, but .*{FILE} says 20 and 30"):
        CocoFolder(root)
    with pytest.raises(ValueError, match=r"40.png is \(20, 25\).*says \(20, 30\)"):
        CocoFolder(root, check_files=False)[2]


def test_files_that_are_no_image_are_named(content, write):
    root = write(content)
    (root / "images" / "40.png").write_text("no image")
    with pytest.raises(ValueError, match=rf"40.png, listed in .*{FILE}, is no readable image"):
        CocoFolder(root)


def test_truncated_images_are_named_when_read(content, write):
    root = write(content)
    path = root / "images" / "40.png"
    path.write_bytes(path.read_bytes()[:200])
    dataset = CocoFolder(root)  # the header is whole
    with pytest.raises(OSError, match=r"40.png cannot be decoded"):
        dataset[2]


@pytest.mark.parametrize("damage", ["missing", "truncated", "other size", "no image"])
def test_unreadable_images_are_skipped_on_request(content, write, damage):
    root = write(content)
    dataset = CocoFolder(root, unreadable="skip", transforms=lambda image, target: (image, target))
    path = root / "images" / "40.png"
    whole = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(whole[:200])
    elif damage == "other size":
        PIL.Image.new("RGB", (25, 20)).save(path)
    elif damage == "no image":
        path.write_text("no image")
    image, said = dataset[2]
    assert image is None
    assert said.keys() == {"image_id", "error"}
    assert (type(said["image_id"]), said["image_id"]) == (int, 40)
    assert "40.png" in said["error"]
    assert pickle.loads(pickle.dumps(said)) == said
    assert [dataset[i][1]["image_id"] for i in (0, 1, 3)] == [10, 30, 50]
    with pytest.raises((OSError, ValueError)) as refused:
        CocoFolder(root, check_files=False)[2]
    assert str(refused.value) == said["error"]
    if damage == "truncated":
        CocoFolder(root, unreadable="skip")  # the header is whole
        return
    with pytest.warns(UserWarning, match=rf"{FILE}: 1 of 4 images cannot be read and are skipped: .*40.png") as found:
        CocoFolder(root, unreadable="skip")
    assert [warning.filename for warning in found] == [__file__]


def test_the_warning_counts_all_images_that_are_skipped(content, write):
    root = write(content)
    for number in (10, 30):
        (root / "images" / f"{number}.png").unlink()
    (root / "images" / "40.png").write_text("no image")
    with pytest.warns(UserWarning, match=r"3 of 4 images cannot be read .*10.png is missing.* 1 more.*40.png, listed"):
        dataset = CocoFolder(root, unreadable="skip")
    assert [image is None for image, _ in dataset] == [True, True, True, False]


def test_whatever_a_decoder_raises_names_the_file(content, write, monkeypatch):
    dataset = CocoFolder(write(content))

    def fail(*args):
        raise SyntaxError("broken PNG file")

    monkeypatch.setattr(images.PIL.Image, "open", fail)
    with pytest.raises(OSError, match=r"10.png cannot be decoded: broken PNG file"):
        dataset[0]
    with pytest.raises(ValueError, match=r"10.png, listed in .* is no readable image: SyntaxError: broken PNG file"):
        CocoFolder(dataset.root)


def test_an_image_stored_turned_is_named_so(content, write):
    root = write(content)
    PIL.Image.new("RGB", SIZE).save(root / "images" / "40.png", exif=ORIENTED)
    with pytest.raises(ValueError, match=r"40.png is 30 high and 20 wide, .* 20 and 30, .* EXIF orientation 6"):
        CocoFolder(root)


def jpeg(mode, **options):
    """A JPEG of smooth noise."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 8, len(PIL.Image.new(mode, (1, 1)).getbands())), np.uint8)
    picture = PIL.Image.fromarray(noise.squeeze(), mode).resize(SIZE[::-1], PIL.Image.Resampling.BILINEAR)
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


ORIENTED = PIL.Image.Exif()
ORIENTED[0x0112] = 6  # turned by 90 degrees, which detectors' annotations do not follow


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"exif": ORIENTED}])
@pytest.mark.parametrize("has_torchvisions", [True, False])
def test_jpegs_have_the_pixels_that_pillow_reads(mode, options, has_torchvisions, content, write, monkeypatch):
    root, decode = write(content), images.decode_jpeg
    path = root / "images" / "40.png"  # whatever its name says
    path.write_bytes(jpeg(mode, **options))
    calls = []
    monkeypatch.setattr(images, "decode_jpeg", (lambda *a: calls.append(0) or decode(*a)) if has_torchvisions else None)
    image, _ = CocoFolder(root)[2]
    with PIL.Image.open(path) as picture:
        assert np.array_equal(image.permute(1, 2, 0), np.array(picture.convert("RGB")))
    assert image.is_contiguous()
    assert len(calls) == has_torchvisions


def test_truncated_jpegs_are_named_when_read(content, write):
    root = write(content)
    path = root / "images" / "40.png"
    path.write_bytes(jpeg("RGB")[:-40])
    dataset = CocoFolder(root)
    with pytest.raises(OSError, match=r"40.png cannot be decoded: image file is truncated"):
        dataset[2]
