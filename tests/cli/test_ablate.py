import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from detmix.cli import ablate
from detmix.cli.train import NOISE, DetectorCLI
from detmix.training.ablation import Results, Run, as_arguments, prepare_set, read_grid

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in NOISE),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # of Lightning's use
]
ROOT = Path(__file__).parents[2]
CONFIG = """
trainer:
  max_epochs: 3
  check_val_every_n_epoch: 1
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  enable_model_summary: false
model:
  detector: FasterRCNN
  backbone: timm/resnet10t
  fpn_channels: 32
  options: {min_size: 48, max_size: 48, rpn_post_nms_top_n_train: 20, rpn_post_nms_top_n_test: 20}
  warmup_steps: 1
  lr: 0.005
data: {batch_size: 2, num_workers: 0}
checkpoint: {monitor: null}
last: {every_n_steps: 2}
"""
GRID = """
config: tiny.yaml
baseline: none
arms:
  none: {data.mixup: null}
  mixed: {data.mixup: {class_path: detmix.MixUp, init_args: {alpha: 1.5}}}
sets:
  drawn: {shapes: {num_train: 8, num_val: 3}}
blocks:
  - {sets: [drawn], arms: [none, mixed], seeds: [0, 1]}
"""
FIGURES = ("set", "arm", "seed", "steps", "AP", "AP50", "train_AP", "train_AP50", "curve", "config", "weights")


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path / "grid.yaml"


def command(grid, results, work, *options):
    line = [sys.executable, "tools/ablate.py", "run", grid, "--results", results, "--work", work, *options]
    return [str(part) for part in line]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def figures(results):
    with results.open(newline="") as file:
        return [{key: row[key] for key in FIGURES} for row in csv.DictReader(file)]


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        ablate.main([str(argument) for argument in arguments])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    return said


def test_mistakes_are_one_line(grid, tmp_path, capsys):
    assert "there is no none.yaml" in failure(capsys, "run", "none.yaml")
    assert "root must be NAME=FOLDER" in failure(capsys, "run", grid, "--root", "cards=/none")
    missing = failure(capsys, "run", grid, "--work", tmp_path / "w", "--weights_backbone", "none.pth")
    assert "weights_backbone must be a file, but there is no none.pth" in missing
    assert "has no row of" in failure(capsys, "report", grid, "--results", tmp_path / "r.csv")
    assert "expected a whole number of at least 1" in failure(capsys, "run", grid, "--workers", "0")


def test_help_starts_without_torch(tmp_path):
    code = "import sys; from detmix.cli import ablate; ablate.make_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_a_run_gives_a_row_and_a_report_says_what_is_missing(grid, tmp_path, capsys):
    results = tmp_path / "results/grid.csv"
    done = subprocess.run(
        command(grid, results, tmp_path / "w", "--max_runs", "1"),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = Results(results).rows.values()
    assert (row["set"], row["arm"], row["seed"], row["steps"]) == ("drawn", "none", "0", "12")
    steps = [int(point.split(":")[0]) for point in row["curve"].split()]
    assert steps == [3, 7, 11]
    assert float(row["curve"].rpartition(":")[2]) == float(row["AP"])  # the last validation is that of the last weights
    assert not list((tmp_path / "w").glob("**/*.ckpt"))
    assert ablate.main(["report", str(grid), "--results", str(results)]) == 0
    page = (tmp_path / "results/grid.md").read_text()
    assert "1 of 4 runs have ended" in page
    assert "* drawn, mixed: seeds 0, 1" in page
    assert "| mixed | 0 of 2 | not measured |" in page
    assert (tmp_path / "results/grid.png").read_bytes()[:4] == b"\x89PNG"


def test_arms_of_one_seed_start_from_equal_weights_and_see_the_same_images_in_the_same_order(
    grid, tmp_path, monkeypatch
):
    found = read_grid(grid)
    seen = {}
    monkeypatch.setattr("sys.argv", ["detmix"])

    class Watch(DetectorCLI):
        def after_fit(self):
            pass

        def before_fit(self):
            start = {key: value.clone() for key, value in self.model.state_dict().items()}
            images = []
            original = self.datamodule.on_before_batch_transfer

            def record(batch, index):
                images.append(
                    [(target["image_id"], image.double().mean().item()) for image, target in zip(*batch, strict=True)]
                )
                return original(batch, index)

            self.datamodule.on_before_batch_transfer = record
            seen[run] = start, images

    for run in found.runs():
        options = {**prepare_set(found, run.set, {}, tmp_path / "w"), **found.options_of(run)}
        arguments = ["--config", str(found.config), *as_arguments(options), f"--seed_everything={run.seed}"]
        quick = ["--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0"]
        Watch(args=["fit", *arguments, "--run_dir", str(tmp_path / run.folder), *quick])
    for seed in (0, 1):
        (weights, images), (others, other_images) = (seen[Run("drawn", arm, seed)] for arm in ("none", "mixed"))
        assert all(torch.equal(value, others[key]) for key, value in weights.items())
        assert images == other_images
        assert len(images) == 12
    assert seen[Run("drawn", "none", 0)][1] != seen[Run("drawn", "none", 1)][1]
    key = "model.backbone.fpn.inner_blocks.0.0.weight"
    assert not torch.equal(seen[Run("drawn", "none", 0)][0][key], seen[Run("drawn", "none", 1)][0][key])


@pytest.mark.slow
def test_a_grid_that_is_killed_ten_times_ends_with_the_rows_of_one_left_alone(grid, tmp_path):
    left = tmp_path / "left.csv"
    subprocess.run(command(grid, left, tmp_path / "left"), cwd=ROOT, env=environment(), check=True, capture_output=True)
    killed, rng = tmp_path / "killed.csv", random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(
            command(grid, killed, tmp_path / "killed"), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(4, 14))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(
        command(grid, killed, tmp_path / "killed"), cwd=ROOT, env=environment(), check=True, capture_output=True
    )
    assert figures(killed) == figures(left)
    assert len(figures(left)) == 4


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_continues(grid, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.replace("max_epochs: 3", "max_epochs: 30"))
    line = command(grid, tmp_path / "r.csv", tmp_path / "w", "--max_runs", "1", "--keep")
    process = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "w").glob("**/last.ckpt")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=200)[0].decode()
    assert process.returncode == 130
    assert "Interrupted; the runs in progress save a checkpoint" in said
    assert not (tmp_path / "r.csv").exists()
    subprocess.run(line, cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert "Resuming from" in (tmp_path / "w/drawn/none/seed_0/log.txt").read_text()
    (row,) = figures(tmp_path / "r.csv")
    assert row["steps"] == "120"
