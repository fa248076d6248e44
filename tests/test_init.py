import inspect
import subprocess
import sys

import pytest

import detmix
import detmix.albumentations
from detmix import functional
from detmix.datasets import shapes
from detmix.datasets.coco import folder as coco
from detmix.mixing import arrays


def test_importing_detmix_imports_torch_and_torchvision_only():
    code = "from detmix import *; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torchvision" in loaded
    unwanted = {"lightning", "albumentations", "pycocotools", "cv2", "matplotlib", "jsonargparse", "transformers"}
    assert not unwanted & set(loaded)


def test_every_public_name_is_there():
    assert all(hasattr(detmix, name) for name in detmix.__all__)


PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in (
        (detmix, detmix.__all__),
        (functional, functional.__all__),
        (detmix.albumentations, detmix.albumentations.__all__),
        (arrays, ["mixup_arrays"]),
        (coco, ["CocoFolder"]),
        (shapes, ["draw_shapes"]),
    )
    for name in names
    if inspect.isroutine(getattr(module, name)) or inspect.isclass(getattr(module, name))
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example_that_its_doctest_runs(name):
    assert ">>>" in inspect.getdoc(PUBLIC[name])
