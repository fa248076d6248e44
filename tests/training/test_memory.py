"""Memory of a long training: measured in a process of its own, of which a part that leaks shows what a leak would do.

Real are the command line with its loggers, checkpoints and pictures, two persistent workers for each split, their
Albumentations, checks, mixup, validation, and the weighted losses of FCOS. Only its backbone is a stub, a convolution.
"""

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import albumentations as A
import lightning as L
import pytest
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from detmix.cli.train import DetectorCLI
from detmix.datasets.shapes import draw_shapes
from detmix.training import module

ROOT = Path(__file__).parents[2]
NAME = "tests.training.test_memory"
WARM_UP, STEPS, EVERY = 600, 2000, 40  # the first validation, after 400 steps, starts workers of its own
LEAKING_STEPS = 1000  # a leak shows in fewer steps, as both it and the bound grow with them
KEPT = 8 * 1024
"""Bytes that a leak keeps at each step."""
BOUND = 4 * 1024
"""Growth at each step that half of that leak would reach."""
# What is freed goes back to the system at once, in the workers too: what they might use again is no leak.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
ENVIRONMENT |= {"MALLOC_TRIM_THRESHOLD_": "65536"}
OPTIONS = (
    f"fit --config configs/demo.yaml --data.batch_size 2 --data.num_workers 2 "
    "--trainer.max_epochs -1 --trainer.check_val_every_n_epoch 8 --trainer.log_every_n_steps 5 "
    "--trainer.enable_progress_bar false --data.mixup.p 1 --data.mixup.stop null --last.every_n_steps 50 "
    f"--trainer.callbacks+={NAME}.Watch"
)


class Watch(L.Callback):
    """Record what this process and its workers occupy, pages that they share once, every few steps."""

    def __init__(self):
        self.occupied = []

    def on_train_start(self, *_):
        gc.freeze()  # what was imported: it is much to look through each time, and none of it grows

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % EVERY == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            self.occupied.append(sum(map(proportional_set_size, [os.getpid(), *children()])))

    def on_train_end(self, trainer, *_):
        Path(trainer.log_dir, "memory.json").write_text(json.dumps([len(children()), self.occupied]))


class LeakingCallback(L.Callback):
    """Keeps something of every step."""

    def __init__(self):
        self.kept = []

    def on_train_batch_end(self, *_):
        self.kept.append(os.urandom(KEPT))


class LeakingTransform(A.ImageOnlyTransform):
    """Keeps, in its worker, something of every sample, of which a step has two."""

    def __init__(self):
        super().__init__(p=1)
        self.kept = []

    def apply(self, img, **_):
        self.kept.append(os.urandom(KEPT // 2))
        return img


def children():
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


def proportional_set_size(pid):
    """Without mapped files, such as libraries, of which a process has more the fewer others map them."""
    rows = [row.split() for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    sizes = [int(row[1]) for row in rows if row[0] in ("Pss_Anon:", "Pss_Shmem:")]
    assert len(sizes) == 2
    return sum(sizes) * 1024


def small_fcos(name, num_classes, **_):
    """FCOS of which nothing is heavy but what it has of ours."""
    backbone = nn.Conv2d(3, 32, 16, stride=16)
    return FCOS(backbone, num_classes, anchor_generator=AnchorGenerator(((16,),), ((1.0,),)), min_size=32, max_size=32)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=100, num_val=4)


def growth(drawn, run_dir, steps, options=""):
    """Bytes by which the memory of a training grows over the steps after its warm-up, by medians of five."""
    line = f"{OPTIONS} --trainer.max_steps {WARM_UP + steps} {options} --data.root {drawn} --run_dir {run_dir}"
    done = subprocess.run(
        [sys.executable, "-m", NAME, *line.split()],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    workers, occupied = json.loads((run_dir / "version_0/memory.json").read_text())
    assert workers == 4
    assert len(occupied) == (WARM_UP + steps) // EVERY
    first = WARM_UP // EVERY
    return statistics.median(occupied[-5:]) - statistics.median(occupied[first - 5 : first])


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("leak", "steps"),
    [
        ("", STEPS),
        (f"--trainer.callbacks+={NAME}.LeakingCallback", LEAKING_STEPS),
        (f"--data.augment+={NAME}.LeakingTransform", LEAKING_STEPS),
    ],
    ids=["as it is", "leak in training", "leak in workers"],
)
def test_memory_is_flat_over_2000_steps_unless_something_leaks(leak, steps, drawn, tmp_path):
    grown = growth(drawn, tmp_path, steps, leak)
    sys.stdout.write(f"grown by {grown / 1e6:.1f} MB\n")
    assert (grown < BOUND * steps) == (not leak)


if __name__ == "__main__":
    module.build_detector = small_fcos
    DetectorCLI()
