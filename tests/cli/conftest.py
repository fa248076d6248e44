import pytest

from detmix.datasets.shapes import draw_shapes
from tests.training.narrow import narrow


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder with 8 drawn training images and 6 for validation, the last with a crowd."""
    return draw_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=8, num_val=6)


@pytest.fixture(scope="module", autouse=True)
def of_narrow_layers():
    """Whatever is built on a ResNet-18 is built on the stand-in."""
    with narrow():
        yield
