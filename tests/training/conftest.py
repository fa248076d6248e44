import pytest

from detmix.datasets.shapes import draw_shapes


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder with 8 drawn training images and 4 for validation."""
    return draw_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=8, num_val=4)
