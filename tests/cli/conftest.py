import pytest

from tests.training.narrow import narrow


@pytest.fixture(scope="module", autouse=True)
def of_narrow_layers():
    """Whatever is built on a ResNet-18 is built on the stand-in."""
    with narrow():
        yield
