"""Train or validate a detector with mixup: ``tools/train.py fit --config configs/demo.yaml``."""

import sys

from detmix.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
