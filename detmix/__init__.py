"""Mixup for object detection: blend two images on a shared canvas and weight every object's loss."""

__version__ = "0.1.0"
