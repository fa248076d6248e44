"""Annotations of four images, as a content that tests change and write."""

import numpy as np
from pycocotools import mask as coco_mask

FILE = "instances_train.json"


SIZE = (20, 30)  # height, width of every image


TRIANGLE = [[4.0, 3.0, 14.0, 3.0, 9.0, 12.5]]


PIXELS = np.zeros(SIZE, dtype=np.uint8)
PIXELS[5:9, 20:26] = 1


def compressed(pixels):
    rle = coco_mask.encode(np.asfortranarray(pixels))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def uncompressed(pixels):
    counts, last = [0], 0
    for value in pixels.flatten(order="F").tolist():
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return {"size": list(pixels.shape), "counts": counts}


def annotation(number, image, category=7, **keys):
    x = float(number % 5)
    base = {"id": number, "image_id": image, "category_id": category, "bbox": [x, 2.0, 10.5, 8.25], "area": 50.5}
    points = [x, 2.0, 2, x + 3, 4.5, 1]
    return {**base, "iscrowd": 0, "segmentation": TRIANGLE, "keypoints": points, **keys}
