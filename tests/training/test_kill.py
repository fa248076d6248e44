"""Real training processes, killed and resumed, against one that was left alone."""

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

from detmix.datasets.shapes import draw_shapes

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "--config configs/demo.yaml --model.fpn_channels 32 --data.batch_size 4 --data.num_workers 1 "
    "--trainer.max_epochs 3 --trainer.check_val_every_n_epoch 2 --trainer.log_every_n_steps 1 --data.mixup.stop 3 "
    "--last.every_n_steps 2 --trainer.enable_progress_bar false "
    "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging --trainer.callbacks.decay 0.9"
)
SMALL = '--model.options={"min_size":[56,64,72],"max_size":72}'


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=24, num_val=6)


def start(shapes, run_dir, *options):
    """A training process, in a process group of its own."""
    command = [sys.executable, "tools/train.py", "fit", *OPTIONS.split(), SMALL, "--data.root", shapes]
    return subprocess.Popen(
        [*command, "--run_dir", run_dir, "--ckpt_path", "last", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process):
    """What a process says until it ends by itself."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def left_alone(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("left_alone")
    finish(start(drawn, folder))
    return folder / "version_0"


def assert_same(run, reference):
    """Every tensor and number of the last checkpoint, and every row of the log."""
    found, wanted = (torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (run, reference))
    assert found["global_step"] == wanted["global_step"] == 18
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert_equal(found[key], wanted[key], key)
    assert found["DetectionData"] == wanted["DetectionData"]
    rows, wanted_rows = (read_rows(folder) for folder in (run, reference))
    assert rows == wanted_rows


def assert_equal(found, wanted, where):
    assert type(found) is type(wanted), where
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_equal(found[key], wanted[key], f"{where}[{key!r}]")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_equal(one, other, f"{where}[{i}]")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    else:
        assert found == wanted, where


def read_rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))
