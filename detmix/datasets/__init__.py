"""Datasets. Import them from their modules, so that COCO's tools are loaded only where they are needed."""
