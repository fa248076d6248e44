"""Run `detmix.cli.check`."""

import sys

from detmix.cli.check import main

if __name__ == "__main__":
    sys.exit(main())
