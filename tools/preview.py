"""Draw mixed training samples without training: ``tools/preview.py --config configs/demo.yaml``."""

import sys

from detmix.training.cli import PreviewCLI

if __name__ == "__main__":
    sys.stdout.write(f"Drew {PreviewCLI().output}\n")
