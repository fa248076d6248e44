"""Datasets; import them from their modules, so that COCO's tools load only where they are needed."""
