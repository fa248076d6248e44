import pytest

from tests.losses.tiny import DETECTORS, tiny


@pytest.fixture(params=DETECTORS)
def stock(request):
    return tiny(request.param)
