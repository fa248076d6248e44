"""The commands of the documentation, run as they stand, but with a small detector, few steps and no GPU."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from detmix.datasets.shapes import draw_shapes

ROOT = Path(__file__).parents[1]
SMALL = (
    "--trainer.accelerator cpu --trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1 "
    "--trainer.check_val_every_n_epoch 1 --data.num_workers 0 --data.batch_size 2 --data.mixup.stop 1 "
    "--model.weights_backbone null --trainer.enable_progress_bar false"
)


def read_commands(page):
    """The command lines of the shell blocks of a page, continued lines joined, comments cut."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.partition("  #")[0].strip() for line in lines]
    # Not what installs, and then trains or tests, which takes minutes; nor the benchmark, which has tests of its own.
    return [line for line in commands if line.startswith(".venv/bin/") and "benchmark" not in line]


def adapt(command):
    """A command as it runs here: this environment, two processes on one machine, a small detector."""
    words = shlex.split(command)
    if words[0].endswith("torchrun"):
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        for name, value in (("--nproc_per_node", "2"), ("--nnodes", "1"), ("--trainer.num_nodes", "1")):
            if name in words:
                words[words.index(name) + 1] = value
        # Names as COCO's has them.
        annotations = "--data.train_annotations annotations/instances_train.json --data.train_images images"
        validation = "--data.val_annotations annotations/instances_val.json --data.val_images images"
        words += f"--trainer.devices 2 --trainer.precision 32 {annotations} {validation}".split()
    else:
        assert words[0] == ".venv/bin/python"
        words[0] = sys.executable
    if "fit" in words:
        sizes = '{"min_size":64,"max_size":64}'
        words += [*SMALL.split(), "--model.options", sizes]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/training.md", "README.md"])
def test_the_commands_run_one_after_the_other(page, tmp_path):
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("cards", "coco"):
        draw_shapes(tmp_path / name, num_train=12, num_val=2)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    commands = read_commands(page)
    assert len(commands) > 5
    for command in commands:
        done = subprocess.run(
            adapt(command), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        assert "Traceback" not in done.stdout


def test_the_options_it_names_are_those_of_the_command_line():
    text = (ROOT / "docs/training.md").read_text()
    named = set(re.findall(r"--((?:model|data|last|trainer)\.\w+)", text))
    command = [sys.executable, "tools/train.py", "fit", "--help"]
    shown = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert named
    assert all(f"--{name}" in shown for name in named), named
