import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/design.md"


@pytest.mark.filterwarnings("ignore")  # the page shows a training step, not how to silence others' warnings
def test_the_step_that_the_page_traces_gives_its_numbers():
    found = doctest.testfile(str(PAGE), module_relative=False)
    assert found.attempted > 10
    assert not found.failed


def test_files_and_names_of_the_page_are_there():
    text = PAGE.read_text()
    sources = "\n".join(path.read_text() for path in (ROOT / "detmix").rglob("*.py"))
    for file in re.findall(r"`((?:tests/|tools/|mixing/|losses/|datasets/|coco/)?\w+(?:/\w+)*\.py)`", text):
        assert list(ROOT.rglob(file)), file
    for name in re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)`", text):
        assert all(part in sources for part in name.split(".")), name
