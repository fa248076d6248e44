"""Export the detector of a checkpoint: ``tools/export_onnx.py runs/demo/version_0/checkpoints/best.ckpt``."""

import sys

from detmix.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
