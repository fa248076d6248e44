"""Train and validate a detector with mixup: ``tools/train.py fit --config configs/demo.yaml``."""

from detmix.cli.train import DetectorCLI

if __name__ == "__main__":
    DetectorCLI()
