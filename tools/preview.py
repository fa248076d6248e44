"""Draw mixed training samples without training: ``tools/preview.py --config configs/demo.yaml``.

``--replay preview.json`` draws again what the record beside a picture says.
"""

import sys
from pathlib import Path

from detmix.cli.train import PreviewCLI

if __name__ == "__main__":
    output = Path(PreviewCLI().output)
    sys.stdout.write(f"Drew {output}; {output.with_suffix('.json')} records the mixes\n")
