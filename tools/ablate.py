"""Run a grid of trainings and report it."""

import sys

from detmix.cli.ablate import main

if __name__ == "__main__":
    sys.exit(main())
