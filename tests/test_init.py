import subprocess
import sys

import detmix


def test_importing_detmix_imports_torch_and_torchvision_only():
    code = "import detmix, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torchvision" in loaded
    assert not {"lightning", "albumentations", "pycocotools", "cv2", "matplotlib", "jsonargparse"} & set(loaded)


def test_every_public_name_is_there():
    assert all(hasattr(detmix, name) for name in detmix.__all__)
