"""The command that finds every defect of a dataset in COCO format."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detmix.cli.parser import Parser, at_least, run_command, writable_file
from detmix.training.files import write_json

if TYPE_CHECKING:
    from detmix.datasets.coco.check import Check

# What needs torch is imported where it is used, so that --help and mistakes take no time.

DESCRIPTION = """\
Find every defect of a dataset in COCO format. An error is a defect that training refuses or loses objects to; a warning
is one that it can live with. The exit status is 0 without errors, 1 with errors, and 2 if the command fails."""
SHOWN = 3  # messages of a kind


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description=DESCRIPTION)
    parser.add_argument("root", metavar="ROOT", type=Path, help="dataset folder")
    parser.add_argument(
        "--annotations",
        nargs="+",
        metavar="FILE",
        help="json files, relative to ROOT (default: annotations/instances_*.json)",
    )
    parser.add_argument(
        "--images", default="images", metavar="FOLDER", help="image folder, relative to ROOT (default: %(default)s)"
    )
    for name in ("masks", "keypoints"):
        parser.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            help=f"require {name} of every annotation, or ignore them (default: check if all annotations have them)",
        )
    parser.add_argument(
        "--fix",
        type=Path,
        metavar="FOLDER",
        help="write a copy without the defects into this new or empty folder. Its removed.json lists what was left out "
        "or changed. Images are hard links where the system allows: do not change them in place",
    )
    parser.add_argument(
        "--json", type=writable_file, metavar="FILE", help="write every defect with all ids into this json file"
    )
    parser.add_argument(
        "--workers", type=at_least(1), default=1, help="threads that decode images (default: %(default)s)"
    )
    return parser


def find_annotations(root: Path) -> list[str]:
    """Return the json files with the usual names, relative to the folder."""
    if not root.is_dir():
        raise FileNotFoundError(f"root {root} is not a folder.")
    found = [str(path.relative_to(root)) for path in sorted(root.glob("annotations/instances_*.json"))]
    if not found:
        raise FileNotFoundError(f"{root} has no annotations/instances_*.json; name the files with --annotations.")
    return found


def count(number: int, section: str) -> str:
    """Return the number with its noun."""
    singular = "category" if section == "categories" else section[:-1]
    return f"{number} {singular if number == 1 else section}"


def summarize(check: "Check") -> list[str]:
    """Return lines that say what is wrong with one file."""
    from detmix.datasets.coco.defects import KINDS, some

    counts = [count(len(records), name) for name, records in check.table.records.items()]
    lines = [f"{check.annotations_file}: {', '.join(counts)}"]
    groups = defaultdict(list)
    for defect in check.defects:
        groups[defect.severity, defect.kind, defect.section].append(defect)
    for (severity, kind, section), defects in sorted(groups.items()):
        ids = [number for defect in defects for number in defect.ids]
        lines.append(f"  {severity}: {count(len(ids), section)}: {KINDS[kind].text}; ids {some(ids)}")
        lines += [f"    {d.message.removeprefix(f'{check.annotations_file}: ')}" for d in defects[:SHOWN]]
    gone = [count(int(lost.sum()), name) for name, lost in check.lost.items() if lost.any()]
    if gone:
        lines.append(f"  lost to these errors: {', '.join(gone)}")
    elif not check.errors:
        lines.append("  no errors")
    return lines


def as_record(check: "Check") -> dict[str, Any]:
    """Return the same for the json file."""
    return {
        "annotations": str(check.annotations_file),
        "images": str(check.images_folder),
        "counts": {name: len(records) for name, records in check.table.records.items()},
        "lost": {name: int(lost.sum()) for name, lost in check.lost.items()},
        "defects": [
            {
                "severity": defect.severity,
                "kind": defect.kind,
                "table": defect.section,
                "rows": defect.rows,
                "ids": defect.ids,
                "message": defect.message,
            }
            for defect in check.defects
        ],
    }


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Check the files that the command line names, and write what it asks for."""
    return run_command(make_parser(prog), run, arguments)


def run(args: argparse.Namespace) -> int:
    """Check, write the files that are asked for, and return the exit status."""
    from detmix.datasets.coco.check import check_folder
    from detmix.datasets.coco.repair import refuse_target, write_clean

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
    """Print lines at once, because the next file takes a while; escape letters that the terminal does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
