"""Mixing: blend two images and merge their targets, and write ``target["weights"]``."""
