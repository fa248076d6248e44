import json
from pathlib import Path

import pytest
import yaml

from detmix.training.ablation import FIELDS, Results, Run, prepare_set, read_grid
from tests.datasets.coco.defective import FILE, make_content, write

CONFIGS = sorted((Path(__file__).parents[2] / "configs/ablation").glob("*.yaml"))
GRID = {
    "config": "small.yaml",
    "baseline": "none",
    "clean_share": 0.1,
    "arms": {
        "none": {"data.mixup": None},
        "mixed": {"data.mixup": {"class_path": "detmix.MixUp", "init_args": {"alpha": 1.5}}},
    },
    "sets": {
        "a": {"root": "a", "options": {"trainer.max_epochs": 20}},
        "b": {"shapes": {"num_train": 2, "num_val": 1}},
    },
    "blocks": [
        {"sets": ["a"], "arms": ["none", "mixed"], "seeds": [0, 1]},
        {"sets": ["b", "a"], "arms": ["none"], "seeds": [0, 2]},
    ],
}


@pytest.fixture
def make_grid(tmp_path):
    """The function ``make_grid(**changes)``: a grid with some of its keys changed."""

    def make(**changes):
        (tmp_path / "small.yaml").write_text("{}")
        content = {key: value for key, value in (GRID | changes).items() if value is not None}
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return read_grid(tmp_path / "grid.yaml")

    return make


def test_runs_come_in_the_order_of_the_blocks_each_once_with_all_arms_of_a_seed_together(make_grid):
    assert make_grid().runs() == [
        *(Run("a", "none", 0), Run("a", "mixed", 0), Run("a", "none", 1), Run("a", "mixed", 1)),
        *(Run("b", "none", 0), Run("b", "none", 2), Run("a", "none", 2)),
    ]


def test_mixing_stops_where_the_clean_share_begins_unless_the_arm_says_where(make_grid):
    grid = make_grid()
    assert grid.options_of(Run("a", "mixed", 0))["data.mixup"]["init_args"] == {"stop": 18, "alpha": 1.5}
    assert grid.options_of(Run("a", "none", 0)) == {"trainer.max_epochs": 20, "data.mixup": None}
    own = {"data.mixup": {"class_path": "detmix.MixUp", "init_args": {"stop": 3}}}
    assert (
        make_grid(arms={"none": {}, "mixed": own}).options_of(Run("a", "mixed", 0))["data.mixup"] == own["data.mixup"]
    )
    with pytest.raises(ValueError, match=r"clean_share of .* needs trainer.max_epochs among the options of 'b'"):
        grid.options_of(Run("b", "mixed", 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sead": 1}, "must have keys of arms, .*, but has 'sead'"),
        ({"arms": None}, "must have .*, but 'arms' is missing"),
        ({"baseline": "nothing"}, "baseline of .* must be one of none, mixed, but it is 'nothing'"),
        ({"sets": {"a": {"rot": "a"}}}, "set 'a' of .* must have keys of .*, but has 'rot'"),
        ({"blocks": [{"sets": ["a"], "arms": ["some"], "seeds": [0]}]}, "arms of block 0 .* but hold 'some'"),
        ({"blocks": [{"sets": ["a"], "arms": ["none"]}]}, "block 0 of .* but 'seeds' is missing"),
    ],
)
def test_a_mistake_in_a_grid_is_named(changes, message, make_grid):
    with pytest.raises(ValueError, match=message):
        make_grid(**changes)


def test_a_grid_or_config_that_is_missing_is_named(make_grid, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no none\.yaml"):
        read_grid("none.yaml")
    with pytest.raises(FileNotFoundError, match=r"config of .* there is no .*other.yaml"):
        make_grid(config="other.yaml")


def test_rows_are_kept_in_order_and_what_is_missing_is_known(make_grid, tmp_path):
    grid, results = make_grid(), Results(tmp_path / "deep/results.csv")
    assert results.missing(grid) == grid.runs()
    for run in (Run("a", "none", 1), Run("a", "mixed", 0)):
        values = {
            "set": run.set,
            "arm": run.arm,
            "seed": run.seed,
            "AP": "0.5",
            "config": grid.digest(run),
            "weights": "w",
        }
        results.add(run, values)
    lines = (tmp_path / "deep/results.csv").read_text().splitlines()
    assert lines[0] == ",".join(FIELDS)
    assert [line.split(",")[:3] for line in lines[1:]] == [["a", "mixed", "0"], ["a", "none", "1"]]
    again = Results(tmp_path / "deep/results.csv")
    assert again.missing(grid, "w") == [run for run in grid.runs() if run not in again.rows]
    assert len(again.rows) == 2
    with pytest.raises(ValueError, match="has rows that start from w, but these are other"):
        again.missing(grid, "other")


@pytest.mark.parametrize("what", ["config", "arm", "set", "list"])
def test_rows_of_another_configuration_are_refused_by_name(what, make_grid, tmp_path):
    lists = {"a": {"root": "a", "keep": "names.txt", "options": {"trainer.max_epochs": 20}}}
    (tmp_path / "names.txt").write_text("1.jpg\n")
    grid, run = make_grid(sets=GRID["sets"] | lists), Run("a", "mixed", 0)
    results = Results(tmp_path / "results.csv")
    results.add(run, {"set": "a", "arm": "mixed", "seed": 0, "config": grid.digest(run)})
    changed = GRID["arms"] | {"mixed": {"data.mixup": {"class_path": "detmix.MixUp", "init_args": {"alpha": 1.0}}}}
    other = make_grid(
        sets=GRID["sets"] | (lists if what != "set" else {"a": lists["a"] | {"images": "photos"}}),
        arms=changed if what == "arm" else GRID["arms"],
    )
    if what == "config":
        (tmp_path / "small.yaml").write_text("model: {lr: 1}")
    if what == "list":
        (tmp_path / "names.txt").write_text("2.jpg\n")
    with pytest.raises(ValueError, match=r"a row of a, mixed, seed 0 with config \w+, but .* now means"):
        Results(tmp_path / "results.csv").missing(other)


def test_a_file_of_other_columns_is_refused(tmp_path):
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"must have the columns set, .*, but has \['a', 'b'\]"):
        Results(tmp_path / "r.csv")


def test_lists_change_the_training_annotations_and_nothing_else(make_grid, tmp_path):
    content = make_content()
    root = write(tmp_path / "data", content)
    names = [image["file_name"] for image in content["images"]]
    first = content["annotations"][0]
    others = [c["id"] for c in content["categories"] if c["id"] != first["category_id"]]
    (tmp_path / "keep.txt").write_text(f"# a list\n{names[0]}\n{names[1]}\n")
    (tmp_path / "relabel.txt").write_text(f"{first['id']} {others[0]}\n")
    (tmp_path / "leave_out.txt").write_text(f"{content['annotations'][1]['id']}\n")
    files = {key: f"{key}.txt" for key in ("keep", "relabel", "leave_out")}
    grid = make_grid(sets=GRID["sets"] | {"a": {"root": "a", "train": FILE, "val": FILE, **files}})
    options = prepare_set(grid, "a", {"a": str(root)}, tmp_path / "work")
    found = json.loads(Path(options["data.train_annotations"]).read_text())
    assert [image["file_name"] for image in found["images"]] == names[:2]
    kept = {image["id"] for image in found["images"]}
    expected = [
        dict(a) for a in content["annotations"] if a["image_id"] in kept and a["id"] != content["annotations"][1]["id"]
    ]
    for annotation in expected:
        if annotation["id"] == first["id"]:
            annotation["category_id"] = others[0]
    assert found["annotations"] == expected
    assert options["data.val_annotations"] == FILE
    assert json.loads((root / FILE).read_text()) == content


def test_a_list_that_names_what_is_not_there_and_a_root_that_is_not_given_are_named(make_grid, tmp_path):
    root = write(tmp_path / "data", make_content())
    (tmp_path / "keep.txt").write_text("none.jpg\n")
    grid = make_grid(sets=GRID["sets"] | {"a": {"root": "a", "train": FILE, "keep": "keep.txt"}})
    with pytest.raises(ValueError, match=r"keep of keep.txt must name what the json has, but 'none.jpg' is not in it"):
        prepare_set(grid, "a", {"a": str(root)}, tmp_path / "work")
    with pytest.raises(ValueError, match=r"root of set 'a' must be given as --root a=FOLDER; given: b"):
        prepare_set(grid, "a", {"b": str(root)}, tmp_path / "work")


def test_the_grid_of_the_repository_is_sound_and_begins_with_what_it_promises():
    grid = read_grid(next(path for path in CONFIGS if path.name == "mixup.yaml"))
    runs = grid.runs()
    assert {(run.set, run.arm) for run in runs[:9]} == {
        ("cards-60", arm) for arm in ("none", "Beta(1.5, 1.5) weighted", "Beta(1.5, 1.5) unweighted")
    }
    assert {run.seed for run in runs[:9]} == {0, 1, 2}
    assert all(grid.options_of(run) for run in runs)
    assert len({run.folder for run in runs}) == len(runs)
