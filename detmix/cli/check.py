"""Find every defect of a set in COCO format: ``tools/check_dataset.py data/cards --fix data/cards_clean``.

Errors are what training would refuse or go on without; warnings are what it copes with. The exit status is 0 without
errors, 1 with them, 2 if the command could not be carried out.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NoReturn

# detmix, and torch with it, is imported where it is used, so that --help and mistakes take no time.

SHOWN = 3  # messages of a kind


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Exit without the usage."""
        self.exit(2, f"error: {message}\n")


def positive(text: str) -> int:
    """The value of an option that counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text}")
    return int(text)


def make_parser() -> Parser:
    """The command line."""
    description, _, status = __doc__.partition("\n\n")
    parser = Parser(
        description=f"{description.partition(':')[0]}. {' '.join(status.split())}",
    )
    parser.add_argument("root", metavar="ROOT", type=Path, help="the folder")
    parser.add_argument(
        "--annotations",
        nargs="+",
        metavar="FILE",
        help="json files, relative to ROOT (annotations/instances_*.json)",
    )
    parser.add_argument(
        "--images", default="images", metavar="FOLDER", help="of the images, relative to ROOT (%(default)s)"
    )
    for name in ("masks", "keypoints"):
        parser.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            help=f"require {name} of every annotation, or do not look at them (used if all have them)",
        )
    parser.add_argument(
        "--fix",
        type=Path,
        metavar="FOLDER",
        help="write a copy without the defects to this folder, new or empty; removed.json in it lists what was left "
        "out or changed. Images are hard links where the system allows: do not change them in place",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every defect with all ids to this file")
    parser.add_argument("--workers", type=positive, default=1, help="threads that decode images (%(default)s)")
    return parser


def find_annotations(root: Path) -> list[str]:
    """The json files that are named as COCO's and ours."""
    if not root.is_dir():
        raise FileNotFoundError(f"root {root} is not a folder.")
    found = [str(path.relative_to(root)) for path in sorted(root.glob("annotations/instances_*.json"))]
    if not found:
        raise FileNotFoundError(f"{root} has no annotations/instances_*.json; name the files with --annotations.")
    return found


def count(number: int, table: str) -> str:
    """The number with its noun."""
    return f"{number} {({'categories': 'category'}.get(table, table[:-1])) if number == 1 else table}"


def summarize(check: Any) -> list[str]:
    """What is wrong with one file, in lines."""
    from detmix.datasets.coco.defects import KINDS, some

    counts = [count(len(rows), name) for name, rows in check.table.rows.items()]
    lines = [f"{check.annotations_file}: {', '.join(counts)}"]
    groups = defaultdict(list)
    for defect in check.defects:
        groups[defect.severity, defect.kind, defect.table].append(defect)
    for (severity, kind, table), defects in sorted(groups.items()):
        ids = [number for defect in defects for number in defect.ids]
        lines.append(f"  {severity}: {count(len(ids), table)}: {KINDS[kind].text}; ids {some(ids)}")
        lines += [f"    {d.message.removeprefix(f'{check.annotations_file}: ')}" for d in defects[:SHOWN]]
    gone = [count(int(lost.sum()), name) for name, lost in check.lost.items() if lost.any()]
    if gone:
        lines.append(f"  lost to these errors: {', '.join(gone)}")
    elif not check.errors:
        lines.append("  no errors")
    return lines


def as_record(check: Any) -> dict[str, Any]:
    """The same for programs."""
    return {
        "annotations": str(check.annotations_file),
        "images": str(check.images_folder),
        "counts": {name: len(rows) for name, rows in check.table.rows.items()},
        "lost": {name: int(lost.sum()) for name, lost in check.lost.items()},
        "defects": [{"severity": defect.severity, **defect._asdict()} for defect in check.defects],
    }


def main() -> int:
    """Check the files that the command line names, and write what it asks for."""
    parser = make_parser()
    args = parser.parse_args()
    if args.json and args.json.is_dir():
        parser.error(f"argument --json: {args.json} is a folder")
    if args.json and not (args.json.parent.is_dir() and os.access(args.json.parent, os.W_OK)):
        parser.error(f"argument --json: {args.json} cannot be written; is its folder there?")
    try:
        return run(args)
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))


def run(args: argparse.Namespace) -> int:
    """The exit status of what was asked for."""
    from detmix.datasets.coco.check import check_folder
    from detmix.datasets.coco.repair import refuse_target, write_clean
    from detmix.training.files import write_json

    options = {"masks": args.masks, "keypoints": args.keypoints, "workers": args.workers}
    files = args.annotations or find_annotations(args.root)
    if args.fix:
        refuse_target(args.root, args.fix)  # before minutes of checking
    checks = []
    for file in files:
        checks.append(check_folder(args.root, file, args.images, **options))
        show(summarize(checks[-1]))
    if args.json:
        write_json([as_record(check) for check in checks], args.json, indent=1)
    if args.fix:
        listed = write_clean(checks, args.root, args.fix)
        changes = sum(map(len, json.loads(listed.read_text(encoding="utf-8")).values()))
        show([f"Wrote {args.fix}; {listed} lists {count(changes, 'records')} removed or changed."])
    return int(any(check.errors for check in checks))


def show(lines: list[str]) -> None:
    """Print at once, as the next file takes a while; letters that the terminal does not know are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
