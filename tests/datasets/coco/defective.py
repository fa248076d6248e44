"""A small sound COCO-format set, and every kind of defect put into it."""

import copy
import io
import json

import numpy as np
import PIL.Image

FILE = "annotations/instances_train.json"
HEIGHT, WIDTH = 20, 30
COUNT = 6  # images 1 to 6; annotations 11 and 12 are of image 1, 21 and 22 of image 2, ...


def make_content():
    """The json: two annotations an image with box, polygon and keypoints."""
    images = [{"id": n, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH} for n in range(1, COUNT + 1)]
    annotations = [
        {
            "id": 10 * n + k,
            "image_id": n,
            "category_id": 4 + k,
            "bbox": [2 * k, n, 10, 8],
            "area": 40,
            "iscrowd": 0,
            "segmentation": [[2, 2, 12, 2, 7, 10]],
            "keypoints": [3, 4, 2, 5, 6, 1],
        }
        for n in range(1, COUNT + 1)
        for k in (1, 2)
    ]
    categories = [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(root, content, files=True):
    """Write the json and noise of the json's size for every image that is not there."""
    for folder in ("annotations", "images"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / FILE).write_text(json.dumps(content))
    if files:
        for image in make_content()["images"]:
            picture(image["id"]).save(root / "images" / image["file_name"])
    return root


def picture(seed=0, size=(HEIGHT, WIDTH), dtype=np.uint8, channels=(3,)):
    highest = np.iinfo(dtype).max
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, highest, (*size, *channels), dtype))


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def oriented(value):
    exif = PIL.Image.Exif()
    exif[0x0112] = value
    return exif


def of_annotation(key, value):
    """Annotation 31 gets this value."""

    def spoil(content, root):
        content["annotations"][4][key] = value

    return spoil


def of_image(key, value):
    """Image 3 gets this value."""

    def spoil(content, root):
        content["images"][2][key] = value

    return spoil


def of_file(make, name="3.png"):
    """The file of image 3 gets these bytes."""

    def spoil(content, root):
        content["images"][2]["file_name"] = name
        (root / "images" / name).write_bytes(make())

    return spoil


def again(table, row, **changed):
    def spoil(content, root):
        content[table].append({**copy.deepcopy(content[table][row]), **changed})

    return spoil


def without(table, row, key):
    def spoil(content, root):
        del content[table][row][key]

    return spoil


def mask_where(key):
    """Annotation 11 has nothing for the key and 31 something broken, which is thus not used."""

    def spoil(content, root):
        del content["annotations"][0][key]
        content["annotations"][4][key] = [[1, 2, 3]]

    return spoil


def links_out(content, root):
    path = root / "images" / "3.png"
    path.rename(root / "outside.png")
    path.symlink_to(root / "outside.png")


def names_keypoints(content, root):
    content["categories"][0]["keypoints"] = ["a", "b"]
    content["categories"][1]["keypoints"] = ["a", "b", "c"]


def listed_twice(content, root):
    content["images"][2]["file_name"] = "2.png"


RLE = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH - 9, 9]}
NINES = [10 * n + k for n in range(1, COUNT + 1) for k in (1, 2)]
FALLEN = [31, 32]  # with image 3

SPOILERS = {
    # name: (how, {(kind, table): ids}, annotations lost)
    "record": (lambda c, r: c["annotations"].append(5), {("record", "annotations"): [None]}, [None]),
    "image record": (lambda c, r: c["images"].append([]), {("record", "images"): [None]}, []),
    "field": (without("annotations", 4, "image_id"), {("field", "annotations"): [31]}, [31]),
    "empty record": (lambda c, r: c["annotations"].append({}), {("field", "annotations"): [None]}, [None]),
    "image field": (without("images", 2, "height"), {("field", "images"): [3]}, FALLEN),
    "category field": (
        without("categories", 0, "name"),
        {("field", "categories"): [5]},
        [number for number in NINES if number % 10 == 1],
    ),
    "type": (of_annotation("category_id", 5.0), {("type", "annotations"): [31]}, [31]),
    "huge id": (of_annotation("id", 2**63), {("type", "annotations"): [2**63]}, [2**63]),
    "name type": (of_image("file_name", 3), {("type", "images"): [3]}, FALLEN),
    "repeated record": (again("annotations", 4), {("repeated record", "annotations"): [31]}, [31]),
    "repeated image": (again("images", 2), {("repeated record", "images"): [3]}, []),
    "ambiguous id": (again("images", 2, width=31), {("ambiguous id", "images"): [3, 3]}, FALLEN),
    "ambiguous category": (
        again("categories", 0, name="cow"),
        {("ambiguous id", "categories"): [5, 5]},
        [number for number in NINES if number % 10 == 1],
    ),
    "shared id": (again("annotations", 4, area=41), {("shared id", "annotations"): [31]}, []),
    "image size": (of_image("height", 0), {("image size", "images"): [3]}, FALLEN),
    "file name": (of_image("file_name", "../3.png"), {("file name", "images"): [3]}, FALLEN),
    "repeated file": (listed_twice, {("repeated file", "images"): [3]}, []),
    "unknown image": (of_annotation("image_id", 7), {("unknown image", "annotations"): [31]}, [31]),
    "unknown category": (of_annotation("category_id", 7), {("unknown category", "annotations"): [31]}, [31]),
    "crowd flag": (of_annotation("iscrowd", 2), {("crowd flag", "annotations"): [31]}, [31]),
    "area": (of_annotation("area", -1), {("area", "annotations"): [31]}, []),
    "box": (of_annotation("bbox", [1, 2, 3]), {("box", "annotations"): [31]}, [31]),
    "no box": (without("annotations", 4, "bbox"), {("box", "annotations"): [31]}, [31]),
    "box NaN": (of_annotation("bbox", [1, 2, float("nan"), 4]), {("box NaN", "annotations"): [31]}, [31]),
    "box infinite": (of_annotation("bbox", [1, 2, float("inf"), 4]), {("box NaN", "annotations"): [31]}, [31]),
    "empty box": (of_annotation("bbox", [5, 5, 0, 4]), {("empty box", "annotations"): [31]}, [31]),
    "negative box": (of_annotation("bbox", [5, 5, 4, -4]), {("empty box", "annotations"): [31]}, [31]),
    "box outside": (of_annotation("bbox", [WIDTH, 5, 4, 4]), {("box outside", "annotations"): [31]}, [31]),
    "box clipped": (of_annotation("bbox", [25, 5, 9, 4]), {("box clipped", "annotations"): [31]}, []),
    "polygon": (of_annotation("segmentation", [[1, 2, 3, 4, 5]]), {("polygon", "annotations"): [31]}, [31]),
    "short polygon": (of_annotation("segmentation", [[1, 2, 3, 4]]), {("polygon", "annotations"): [31]}, [31]),
    "run-length code": (
        of_annotation("segmentation", {**RLE, "size": [WIDTH, HEIGHT]}),
        {("run-length code", "annotations"): [31]},
        [31],
    ),
    "keypoints": (of_annotation("keypoints", [1, 2, 2]), {("keypoints", "annotations"): [31]}, [31]),
    "keypoint counts": (
        names_keypoints,
        {("keypoint counts", "categories"): [5, 6], ("unused keypoints", "annotations"): NINES},
        [],
    ),
    "unused segmentation": (
        mask_where("segmentation"),
        {("partial segmentation", "annotations"): [11], ("unused segmentation", "annotations"): [31]},
        [],
    ),
    "unused keypoints": (
        mask_where("keypoints"),
        {("partial keypoints", "annotations"): [11], ("unused keypoints", "annotations"): [31]},
        [],
    ),
    "missing file": (of_image("file_name", "7.png"), {("missing file", "images"): [3]}, FALLEN),
    "endless name": (of_image("file_name", "7" * 300), {("missing file", "images"): [3]}, FALLEN),
    "no image": (of_file(lambda: b"no image"), {("no image", "images"): [3]}, FALLEN),
    "empty file": (of_file(bytes), {("no image", "images"): [3]}, FALLEN),
    "undecodable": (of_file(lambda: encoded(picture(), "PNG")[:200]), {("undecodable", "images"): [3]}, FALLEN),
    "truncated JPEG": (
        of_file(lambda: encoded(picture(), "JPEG")[:-40], "3.jpg"),
        {("undecodable", "images"): [3]},
        FALLEN,
    ),
    "file size": (of_file(lambda: encoded(picture(size=(20, 25)), "PNG")), {("file size", "images"): [3]}, FALLEN),
    "turned": (
        of_file(lambda: encoded(picture(size=(WIDTH, HEIGHT)), "JPEG", exif=oriented(6)), "3.jpg"),
        {("turned", "images"): [3]},
        [],
    ),
    "orientation": (
        of_file(lambda: encoded(picture(), "JPEG", exif=oriented(3)), "3.jpg"),
        {("orientation", "images"): [3]},
        [],
    ),
    "mislabelled": (of_file(lambda: encoded(picture(), "JPEG")), {("mislabelled", "images"): [3]}, []),
    "grey": (of_file(lambda: encoded(picture(channels=()), "PNG")), {("grey", "images"): [3]}, []),
    "CMYK": (
        of_file(lambda: encoded(picture().convert("CMYK"), "JPEG"), "3.jpg"),
        {("CMYK", "images"): [3]},
        [],
    ),
    "16 bits": (
        of_file(lambda: encoded(picture(dtype=np.uint16, channels=()), "PNG")),
        {("16 bits", "images"): [3]},
        [],
    ),
    "link": (links_out, {("link", "images"): [3]}, []),
}
"""How to spoil content and folder, the defects that come of it, and the ids of the annotations lost."""
