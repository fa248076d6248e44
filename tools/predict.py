"""Run `detmix.cli.predict`."""

import sys

from detmix.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
