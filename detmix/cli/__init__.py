"""The commands; `detmix.cli.__main__` runs each by its name."""
