"""Train and validate a detector with mixup: ``tools/train.py fit --config configs/demo.yaml``."""

from detmix.training.cli import DetectorCLI

if __name__ == "__main__":
    DetectorCLI()
