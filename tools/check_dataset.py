"""Find every defect of a dataset in COCO format: ``tools/check_dataset.py data/cards --fix data/cards_clean``."""

import sys

from detmix.cli.check import main

if __name__ == "__main__":
    sys.exit(main())
