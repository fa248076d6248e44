"""The rules of the house: which room imports which, how large a module may be, and words that it does without."""

import ast
import functools
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What the modules of each room of detmix import of the others.
BELOW = {"targets", "mixing", "functional", "losses", "datasets", "albumentations", "visualize"}
ROOMS = {
    "targets": set(),
    "mixing": {"targets"},
    "functional": {"targets", "mixing"},
    "losses": {"targets"},
    "datasets": {"targets", "mixing"},
    "albumentations": {"targets", "mixing"},
    "visualize": {"targets"},
    "training": BELOW,
    "cli": BELOW | {"training"},
    "__init__": {"targets", "mixing", "functional", "losses"},
}
MOST_FILES, MOST_LINES = 7, 350


def read(*patterns):
    """The texts of the files that match, by their paths from the root."""
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for pattern in patterns
        for path in sorted(ROOT.glob(pattern))
        if path.is_file() and "__pycache__" not in path.parts
    }


@functools.cache
def read_house():
    return read("detmix/**/*.py")


@functools.cache
def read_prose():
    return read("README.md", "docs/**/*.md", "configs/**/*.yaml")


def name_of(path):
    """The dotted name of the module in a file; a package has the name of its folder."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module):
    return [*module.split("."), "__init__"][1]


@functools.cache
def parse(text):
    return list(ast.walk(ast.parse(text)))


def read_imports(text, modules):
    """Each name that is imported from detmix, wherever it is: (module, name in it or None, name here)."""
    for node in parse(text):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "detmix":
                    yield alias.name, None, alias.asname or "detmix"
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative imports hide the room"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in modules:
                    yield whole, None, alias.asname or alias.name
                elif node.module.split(".")[0] == "detmix":
                    yield node.module, alias.name, alias.asname or alias.name


def find_wrong_rooms(files):
    """Imports from a room that the importing one does without."""
    modules = {name_of(path) for path in files}
    for path, text in files.items():
        room = room_of(name_of(path))
        for module, _, _ in read_imports(text, modules):
            if room_of(module) not in ROOMS[room] | {room}:
                yield f"{path} imports {module}"


def find_cycles(files):
    """Modules that import each other, directly or through others."""
    modules = {name_of(path) for path in files}
    graph = {name_of(path): {module for module, _, _ in read_imports(text, modules)} for path, text in files.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield " is imported by ".join(error.args[1])


OF_NAMEDTUPLES = {"_asdict", "_fields", "_make", "_replace"}  # which are public all the same


def is_private(name):
    return name is not None and name.startswith("_") and not name.endswith("__") and name not in OF_NAMEDTUPLES


def find_private_names(files):
    """Names with a leading underscore that are imported from another module, or taken from what was imported."""
    modules = {name_of(path) for path in files}
    for path, text in files.items():
        imported = list(read_imports(text, modules))
        yield from (f"{path} imports {module}.{name}" for module, name, _ in imported if is_private(name))
        yield from (f"{path} imports {module}" for module, _, _ in imported if any(map(is_private, module.split("."))))
        here = {name for _, _, name in imported}
        for node in parse(text):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                owner = node.value
                while isinstance(owner, ast.Attribute):
                    owner = owner.value
                if isinstance(owner, ast.Name) and owner.id in here:
                    yield f"{path}:{node.lineno} takes {ast.unparse(node)}"


def find_more_than_exports(files):
    """What the public face of mixing holds apart from its docstring, imports and ``__all__``."""
    _, *body = parse(files["detmix/functional.py"])[0].body
    yield from (ast.unparse(node) for node in body if not isinstance(node, ast.ImportFrom | ast.Assign))
    exported = {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    for node in body:
        if isinstance(node, ast.Assign):
            names = ast.literal_eval(node.value) if ast.unparse(node.targets[0]) == "__all__" else None
            if names is None or set(names) != exported:
                yield ast.unparse(node)


def find_long_modules(files):
    counts = {path: len(text.splitlines()) for path, text in files.items()}
    return (f"{path} has {count} lines" for path, count in counts.items() if count > MOST_LINES)


def find_odd_words(files):
    """The word that stands for *use*, and the old word for a plan where readers of the documentation see it."""
    for path, text in files.items():
        yield from (f"{path}: {line}" for line in text.splitlines() if "heed" in line.lower())
        if path.endswith(".py"):
            text = "\n".join(read_docstrings(text)) if room_of(name_of(path)) in ("mixing", "functional") else ""
        yield from (f"{path}: {line}" for line in text.splitlines() if re.search(r"\bparams\b", line))


def read_docstrings(text):
    for node in parse(text):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


# ---- the house ----


def test_every_room_has_its_rule():
    assert {room_of(name_of(path)) for path in read_house()} == set(ROOMS)


def test_no_room_imports_what_is_above_or_beside_it():
    assert list(find_wrong_rooms(read_house())) == []


def test_no_module_imports_one_that_imports_it():
    assert list(find_cycles(read_house())) == []


def test_names_with_a_leading_underscore_stay_in_their_module():
    assert list(find_private_names(read_house() | read("tools/**/*.py"))) == []


def test_the_public_face_of_mixing_only_exports():
    assert list(find_more_than_exports(read_house())) == []


def test_no_module_is_long():
    assert list(find_long_modules(read_house())) == []


def test_few_files_lie_beside_the_rooms():
    files = [path.name for path in (ROOT / "detmix").iterdir() if path.is_file()]
    assert len(files) <= MOST_FILES, files


def test_odd_words_are_gone():
    assert list(find_odd_words(read_house() | read_prose())) == []


# ---- the same, broken ----

IN_FUNCTION = "\ndef late():\n    "


@pytest.mark.parametrize(
    ("find", "path", "line"),
    [
        (find_wrong_rooms, "detmix/targets.py", "from detmix.mixing.plan import Mix"),
        (find_wrong_rooms, "detmix/targets.py", "import detmix"),
        (find_wrong_rooms, "detmix/mixing/blend.py", "from detmix.losses import weighted"),
        (find_wrong_rooms, "detmix/mixing/blend.py", "from detmix import functional"),
        (find_wrong_rooms, "detmix/losses/rows.py", f"{IN_FUNCTION}from detmix.mixing import plan"),
        (find_wrong_rooms, "detmix/losses/rows.py", "import detmix.mixing.plan as other"),
        (find_wrong_rooms, "detmix/datasets/shapes.py", "from detmix import weight_losses"),
        (find_wrong_rooms, "detmix/datasets/shapes.py", "from detmix.losses import rules"),
        (find_wrong_rooms, "detmix/albumentations/arrays.py", "from detmix.losses.rows import Rows"),
        (find_wrong_rooms, "detmix/visualize.py", "from detmix.mixing.plan import Mix"),
        (find_wrong_rooms, "detmix/training/build.py", f"{IN_FUNCTION}from detmix.cli import train"),
        (find_wrong_rooms, "detmix/__init__.py", "from detmix.training import build"),
        (find_cycles, "detmix/mixing/plan.py", "from detmix.mixing.transform import MixUp"),
        (find_cycles, "detmix/losses/rows.py", f"{IN_FUNCTION}from detmix.losses import weighted"),
        (find_cycles, "detmix/datasets/coco/values.py", "from detmix.datasets.coco import folder"),
        (find_private_names, "detmix/visualize.py", "from detmix.targets import _SIZES"),
        (find_private_names, "detmix/visualize.py", "from detmix import targets\ntargets._SIZES"),
        (find_private_names, "detmix/visualize.py", "import detmix.targets\ndetmix.targets._SIZES"),
        (find_private_names, "detmix/visualize.py", "from detmix.mixing import plan as p\np.Mix._make_one"),
        (find_private_names, "detmix/visualize.py", "from detmix._targets import Target"),
        (find_more_than_exports, "detmix/functional.py", "def more(): ..."),
        (find_more_than_exports, "detmix/functional.py", "from detmix.mixing.plan import draw_lam"),
        (find_more_than_exports, "detmix/functional.py", "canvas_size = max"),
        (find_long_modules, "detmix/targets.py", MOST_LINES * "\n"),
        (find_odd_words, "detmix/cli/train.py", "# Unheeded."),
        (find_odd_words, "README.md", "Heed the weights."),
        (find_odd_words, "docs/training.md", "`params` of a batch"),
        (find_odd_words, "detmix/mixing/plan.py", 'def mix():\n    """Follow params."""'),
    ],
)
def test_what_breaks_a_rule_is_found(find, path, line):
    files = read_house() | read_prose()
    if find is not find_odd_words:  # a page is not a module
        files = {path: text for path, text in files.items() if path.startswith("detmix")}
    before = list(find(files))
    assert len(list(find(files | {path: f"{files[path]}\n{line}\n"}))) > len(before)
