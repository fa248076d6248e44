"""Training processes, killed and resumed, against one that was left alone."""

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from detmix.cli.train import NOISE, DetectorCLI
from detmix.datasets.shapes import draw_shapes
from detmix.training.resume import LastCheckpoint
from tests.training.narrow import FEW, narrow

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "--config configs/demo.yaml --model.fpn_channels 32 --data.batch_size 4 --ckpt_path last "
    "--trainer.check_val_every_n_epoch 2 --trainer.log_every_n_steps 1 --trainer.enable_progress_bar false "
    f'--model.options {{"min_size":[56,64,72],"max_size":72,{FEW}}} '
    "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging --trainer.callbacks.decay 0.9"
)
QUICK = f"{OPTIONS} --trainer.max_epochs 2 --data.mixup.stop 2 --last.every_n_steps 1 --data.num_workers 0"
LONG = f"{OPTIONS} --trainer.max_epochs 10 --data.mixup.stop 9 --last.every_n_steps 4 --data.num_workers 1"

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in NOISE),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # of Lightning's use
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=12, num_val=4)


class Killed(BaseException):
    """Nobody catches it, as nobody does SIGKILL."""


def train(drawn, run_dir, options=QUICK, kill_after=None):
    """Train in this process; which of its checkpoints were written, and when, until one after which it is killed."""
    saved, save = [], LastCheckpoint._save

    def save_and_die(self, trainer, moment):
        save(self, trainer, moment)
        saved.append((moment, trainer.global_step))
        if len(saved) == kill_after:
            raise Killed

    with narrow(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(LastCheckpoint, "_save", save_and_die)
        patch.setattr("sys.argv", ["train.py", "fit", *options.split(), f"--data.root={drawn}", f"--run_dir={run_dir}"])
        try:
            DetectorCLI()
        except Killed:
            assert len(saved) == kill_after
    return saved


@pytest.fixture(scope="module")
def left_alone(drawn, tmp_path_factory):
    """The folder of a short run, and its checkpoints."""
    folder = tmp_path_factory.mktemp("left_alone")
    return folder / "version_0", train(drawn, folder)


SAVED = [("step", 1), ("step", 2), ("epoch", 3), ("step", 4), ("step", 5), ("validation", 6), ("epoch", 6)]


def test_checkpoints_are_written_after_steps_before_validations_and_after_epochs(left_alone):
    assert left_alone[1] == SAVED


REPEATED = (2, 5)  # in the middle of an epoch, as 1 and 4 are


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(n, marks=pytest.mark.slow if n in REPEATED else (), id="-".join(map(str, SAVED[n - 1])))
        for n in range(1, len(SAVED))
    ],
)
def test_a_run_that_is_killed_after_a_checkpoint_ends_as_if_it_had_not_been(number, drawn, left_alone, tmp_path):
    train(drawn, tmp_path, kill_after=number)
    again = train(drawn, tmp_path)
    # A validation that is repeated is safe already, and saved again.
    assert again == SAVED[number - (SAVED[number - 1][0] == "validation") :]
    assert_same(tmp_path / "version_0", left_alone[0], 6)


def test_a_truncated_checkpoint_costs_the_steps_since_the_one_before_it(drawn, left_alone, tmp_path, capsys):
    train(drawn, tmp_path, kill_after=5)
    last = tmp_path / "version_0/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-2000])
    assert train(drawn, tmp_path)[0] == ("step", 5)
    said = capsys.readouterr().err
    assert re.search(r"last.ckpt is damaged: .*\nResuming from .*previous.ckpt", said)
    assert_same(tmp_path / "version_0", left_alone[0], 6)


def test_a_checkpoint_holds_the_whole_config(left_alone):
    run, _ = left_alone
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert checkpoint["config"] == (run / "config.yaml").read_text()


def test_other_batches_in_the_middle_of_an_epoch_are_an_error(drawn, tmp_path, capsys):
    train(drawn, tmp_path, kill_after=1)
    with pytest.raises(ValueError, match=r"batch_size times processes must stay 4, because .*, but it is 2"):
        train(drawn, tmp_path, f"{QUICK} --data.batch_size 2")


@pytest.mark.parametrize("damaged", [["last.ckpt"], ["last.ckpt", "previous.ckpt"]])
def test_where_no_checkpoint_can_be_read_nothing_is_overwritten(damaged, drawn, tmp_path, capsys):
    folder = tmp_path / "version_0/checkpoints"
    folder.mkdir(parents=True)
    for name in damaged:
        (folder / name).write_bytes(b"cut")
    with pytest.raises(SystemExit) as exit_info:
        train(drawn, tmp_path)
    assert exit_info.value.code == 2
    assert re.search(
        r"error: no checkpoint of .*version_0 can be read: .*last.ckpt is damaged", capsys.readouterr().err
    )
    assert sorted(path.name for path in folder.iterdir()) == sorted(damaged)


def start(drawn, run_dir, options=LONG):
    """A training process, in a group of its own with its workers."""
    script = ["-m", "tests.training.narrow"]
    command = [sys.executable, *script, "fit", *options.split(), "--data.root", drawn, "--run_dir", run_dir]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for_step(process, run_dir, step):
    """Until a process has logged a step, or ended."""
    while process.poll() is None:
        logs = sorted(run_dir.glob("version_*/metrics.csv"))
        if logs and any(row["step"] and int(row["step"]) >= step for row in read_rows(logs[-1].parent)):
            return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def long_run(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long_run")
    said, _ = (process := start(drawn, folder)).communicate(timeout=400)
    assert process.returncode == 0, said
    return folder / "version_0"


@pytest.mark.slow
def test_a_process_that_is_killed_a_dozen_times_ends_as_if_it_had_not_been(drawn, long_run, tmp_path):
    rng = random.Random(0)
    steps = sorted(rng.sample(range(1, 26), 12))
    for step in steps:
        process = start(drawn, tmp_path)
        wait_for_step(process, tmp_path, step)
        time.sleep(rng.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
    said, _ = (process := start(drawn, tmp_path)).communicate(timeout=400)
    assert process.returncode == 0, said
    assert_same(max(tmp_path.glob("version_*")), long_run, 30)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_stop_saves_the_step_it_is_in(number, drawn, long_run, tmp_path):
    process = start(drawn, tmp_path)
    wait_for_step(process, tmp_path, 9)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    (stopped,) = re.findall(r"Stopped after step (\d+); --ckpt_path last resumes there", said)
    last = tmp_path / "version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == int(stopped) >= 9
    said, _ = (process := start(drawn, tmp_path)).communicate(timeout=400)
    assert process.returncode == 0, said
    assert f"Resuming from {last}" in said
    assert_same(tmp_path / "version_0", long_run, 30)


def assert_same(run, reference, steps):
    """Every tensor and number of the last checkpoint, and every row of the log."""
    found, wanted = (torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (run, reference))
    assert found["global_step"] == wanted["global_step"] == steps
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
