"""Draw mixed training samples without training: ``tools/preview.py --config configs/demo.yaml``.

``--replay preview.json`` draws again what the record beside a picture says.
"""

import sys

from detmix.cli.preview import main

if __name__ == "__main__":
    sys.exit(main())
