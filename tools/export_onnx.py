"""Run `detmix.cli.export`."""

import sys

from detmix.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
