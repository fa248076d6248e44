import csv
import random
import zipfile

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from detmix.training.checkpoint import find_damage, read_checkpoint
from detmix.training.resume import NAMES, AtomicCheckpointIO, LastCheckpoint, find_last, keep_rows

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory")


@pytest.fixture
def run(tmp_path):
    """A run with a last checkpoint, and the one before it."""
    folder = tmp_path / "version_3/checkpoints"
    folder.mkdir(parents=True)
    for step, name in enumerate(("previous.ckpt", "last.ckpt")):
        torch.save({"step": step, "weights": torch.arange(1000.0)}, folder / name)
    return folder


def test_the_last_checkpoint_of_the_newest_run_is_found(run, tmp_path):
    (tmp_path / "version_2/checkpoints").mkdir(parents=True)
    (tmp_path / "version_2/checkpoints/last.ckpt").write_bytes(b"of an older run")
    (tmp_path / "version_note").mkdir()
    assert find_last(tmp_path) == (run / "last.ckpt", [])
    (tmp_path / "version_10").mkdir()
    assert find_last(tmp_path) is None  # it was killed before it had saved anything


def test_a_run_folder_without_runs_has_none(tmp_path):
    assert find_last(tmp_path) is None
    assert find_last(tmp_path / "nowhere") is None


def test_a_whole_checkpoint_that_was_not_renamed_yet_is_the_newest(run):
    torch.save({"step": 2}, run / NAMES[0])
    assert find_last(run.parents[1])[0] == run / "next.ckpt"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_named_and_the_one_before_it_used(share, run):
    last = run / "last.ckpt"
    content = last.read_bytes()
    last.write_bytes(content[: int(share * len(content))])
    path, (damage,) = find_last(run.parents[1])
    assert path == run / "previous.ckpt"
    assert damage.startswith(f"{last} is damaged: ")
    with pytest.raises(ValueError, match=r"last.ckpt is damaged"):
        read_checkpoint(last)


def test_any_changed_byte_of_the_weights_is_seen(run):
    last, rng = run / "last.ckpt", random.Random(0)
    content = last.read_bytes()
    with zipfile.ZipFile(last) as archive:
        stored = max(archive.infolist(), key=lambda member: member.file_size)
    begin = stored.header_offset + len(stored.filename) + 128  # within the numbers
    for _ in range(50):
        changed = bytearray(content)
        changed[rng.randrange(begin, begin + stored.file_size - 200)] ^= 1 << rng.randrange(8)
        last.write_bytes(changed)
        assert find_damage(last) is not None
        assert find_last(run.parents[1])[0] == run / "previous.ckpt"
    last.write_bytes(content)
    assert find_damage(last) is None


def test_two_damaged_checkpoints_are_an_error_that_names_both(run):
    for name in ("last.ckpt", "previous.ckpt"):
        (run / name).write_bytes(b"nothing")
    with pytest.raises(
        ValueError, match=r"no checkpoint of .*version_3 can be read: .*last.ckpt is .*previous.ckpt is"
    ):
        find_last(run.parents[1])


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path):
    path, writer = tmp_path / "deep/last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)
    with pytest.raises(AttributeError):
        writer.save_checkpoint({"step": 2, "cannot": lambda: None}, path)
    assert read_checkpoint(path) == {"step": 1}


def test_steps_between_checkpoints_are_positive():
    with pytest.raises(ValueError, match="every_n_steps must be null or at least 1, but it is 0"):
        LastCheckpoint(every_n_steps=0)


def read(path):
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_log_keeps_the_rows_that_the_checkpoint_knows(is_killed, tmp_path):
    first = CSVLogger(tmp_path, name="", version="version_0")
    for step in range(4):
        first.log_metrics({"loss": 0.5 * step} | ({"AP": 0.25} if step == 2 else {}), step)
    first.save()
    wanted = read(tmp_path / "version_0/metrics.csv")[:3]
    if is_killed:  # after the log was put aside
        (tmp_path / "version_0/metrics.csv").rename(tmp_path / "version_0/metrics.kept.csv")
    second = CSVLogger(tmp_path, name="", version="version_0")
    keep_rows(second, 3)
    assert read(tmp_path / "version_0/metrics.csv") == wanted
    second.log_metrics({"loss": 7.0, "new": 1.0}, 3)
    second.save()
    assert read(tmp_path / "version_0/metrics.csv") == [*wanted, {"loss": "7.0", "new": "1.0", "step": "3"}]
    assert [path.name for path in (tmp_path / "version_0").iterdir()] == ["metrics.csv"]
