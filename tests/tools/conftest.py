"""Every case at sizes that take no time."""

import contextlib
import functools
import importlib

import cv2
import pytest
import torch

from tests.tools.tiny import SIZES


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The cases of all sections made tiny; and as many threads after a test as before it."""
    for section, cases in SIZES.items():
        builders = importlib.import_module(f"sections.{section}").SECTION.cases
        assert builders.keys() == cases.keys()
        for name, sizes in cases.items():
            monkeypatch.setitem(builders, name, functools.partial(builders[name], **sizes))
    threads = torch.get_num_threads(), cv2.getNumThreads()
    yield
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


@pytest.fixture
def build():
    """The function ``build(section, name, device, **options)`` makes a case, closed after the test."""
    with contextlib.ExitStack() as stack:

        def build(section, name, device="cpu", **options):
            torch.manual_seed(0)
            return stack.enter_context(contextlib.closing(section.SECTION.cases[name](torch.device(device), **options)))

        yield build
