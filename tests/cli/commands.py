"""Commands as tests call them, and sets that they run on."""

from pathlib import Path

import pytest

from detmix.cli import preview as preview_command
from detmix.cli.train import DetectorCLI
from tests.training.narrow import FEW

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
DEMO = next(config for config in CONFIGS if config.stem == "demo")
OPTIONS = f'--model.options {{"min_size":64,"max_size":64,{FEW}}}'
SMALL = f"--model.fpn_channels 32 {OPTIONS} --data.batch_size 4 --data.num_workers 0"
QUICK = "--trainer.max_epochs 2 --trainer.check_val_every_n_epoch 1 --trainer.log_every_n_steps 1 --data.mixup.stop 1"


def command(monkeypatch, tool, line):
    monkeypatch.setattr("sys.argv", [tool, *line.split()])
    return preview_command.main() if tool == "preview.py" else DetectorCLI()


def failure(monkeypatch, capsys, line, tool="train.py"):
    with pytest.raises(SystemExit) as exit_info:
        command(monkeypatch, tool, line)
    assert exit_info.value.code == 2
    return capsys.readouterr().err.strip().split("error: ")[-1]
