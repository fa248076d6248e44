"""Datasets in COCO format: read by `detmix.datasets.coco.folder`, checked and repaired by the modules beside it."""
