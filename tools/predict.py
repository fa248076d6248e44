"""Predict with a checkpoint: ``tools/predict.py runs/demo/version_0/checkpoints/best.ckpt images/``."""

import sys

from detmix.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
