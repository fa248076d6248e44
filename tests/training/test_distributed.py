"""Two processes under torchrun, on the CPU by gloo, beside one."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from detmix.cli.train import NOISE, DetectorCLI
from detmix.datasets.shapes import draw_shapes
from detmix.losses import weight_losses
from detmix.training.build import build_detector
from tests.training.narrow import FEW, narrow

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "--config configs/demo.yaml --model.fpn_channels 32 --data.batch_size 2 --data.num_workers 0 "
    "--trainer.accelerator cpu --trainer.log_every_n_steps 1 --trainer.enable_progress_bar false "
    "--trainer.check_val_every_n_epoch 1 --data.augment [] --data.mixup.p 1 --data.mixup.stop 2 "
    f'--model.options {{"min_size":64,"max_size":64,{FEW}}}'
)
TOGETHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
PAIR = "--trainer.devices 2 --trainer.strategy ddp"

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in NOISE),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # of Lightning's use
]


def run(arguments, processes=1, succeeds=True):
    """What a command of the command line says, in which ResNet-18 is narrow."""
    together = TOGETHER if processes > 1 else []
    command = [sys.executable, *together, "-m", "tests.training.narrow", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
    )
    assert (done.returncode == 0) == succeeds, done.stdout
    return done.stdout


def figures(run_dir, version):
    """The last validation in a log."""
    with (run_dir / f"version_{version}/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/AP"]]
    return {key: value for key, value in rows[-1].items() if key.startswith("val/")}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """16 images to train on and 5 to validate, which are 3 batches: 2 for one process, 1 for the other."""
    return draw_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=16, num_val=5)


@pytest.fixture(scope="module")
def pair(shapes, tmp_path_factory):
    """The folder of a run of two processes, and what they said."""
    folder = tmp_path_factory.mktemp("pair")
    recorder = f"--trainer.callbacks+=tests.training.recording.Recorder --trainer.callbacks.folder {folder}"
    options = f"{OPTIONS} {PAIR} {recorder} --trainer.max_epochs 2 --data.root {shapes} --run_dir {folder}"
    return folder, run(["fit", *options.split()], processes=2)


def test_validation_of_a_set_that_does_not_divide_is_that_of_one_process(pair, shapes, tmp_path, monkeypatch):
    best = f"--ckpt_path {pair[0]}/version_0/checkpoints/best.ckpt --data.root {shapes} --run_dir {tmp_path}"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py", "validate", *f"{OPTIONS} --trainer.devices 1 {best}".split()])
    with narrow():
        DetectorCLI()
    assert float(figures(tmp_path, 0)["val/AR100"]) > 0
    assert figures(tmp_path, 0) == figures(pair[0], 0)  # of the best checkpoint, by which a run ends


@pytest.mark.slow
def test_validate_in_two_processes_gives_what_it_gives_in_one(pair, shapes):
    folder, _ = pair
    best = f"--ckpt_path {folder}/version_0/checkpoints/best.ckpt --data.root {shapes} --run_dir {folder}/again"
    run(["validate", *f"{OPTIONS} {PAIR} {best}".split()], processes=2)
    run(["validate", *f"{OPTIONS} --trainer.devices 1 {best}".split()])
    assert float(figures(folder / "again", 0)["val/AR100"]) > 0
    assert figures(folder / "again", 0) == figures(folder / "again", 1)


def test_processes_train_on_other_images_and_mix_them_differently(pair):
    first, second = (torch.load(pair[0] / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1))
    ids = [{target["image_id"] for target in record["targets"]} for record in (first, second)]
    assert not ids[0] & ids[1]
    lams = [{target["lam"] for target in record["targets"]} for record in (first, second)]
    assert not lams[0] & lams[1]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])


def test_the_gradient_is_the_average_of_what_one_process_computes(pair):
    records = [torch.load(pair[0] / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]
    gradients = [gradients_of(record) for record in records]
    for name, found in records[0]["gradients"].items():
        assert torch.equal(found, records[1]["gradients"][name]), name
        average = (gradients[0][name] + gradients[1][name]) / 2
        torch.testing.assert_close(found, average, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.allclose(gradients[0]["rpn.head.cls_logits.weight"], gradients[1]["rpn.head.cls_logits.weight"])


def gradients_of(record):
    options = json.loads(f'{{"min_size":64,"max_size":64,{FEW}}}')
    with narrow():
        built = build_detector("FasterRCNN", 4, backbone="resnet18", fpn_channels=32, options=options)
    model = weight_losses(built).train()
    model.load_state_dict(record["weights"])
    torch.set_rng_state(record["rng"])
    sum(model(record["images"], record["targets"]).values()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_two_processes_go_on_where_they_were_stopped(pair, shapes, tmp_path):
    last = "--ckpt_path last --last.every_n_steps 3 --trainer.max_epochs 2"
    options = f"{OPTIONS} {PAIR} --data.root {shapes} --run_dir {tmp_path} {last}".split()
    stopper = ["--trainer.callbacks+=tests.training.recording.Stopper", "--trainer.callbacks.step", "3"]
    run(["fit", *options, *stopper], processes=2, succeeds=False)
    said = run(["fit", *options], processes=2)
    assert "Resuming from" in said
    found, wanted = (
        torch.load(folder / "version_0/checkpoints/last.ckpt", weights_only=True) for folder in (tmp_path, pair[0])
    )
    assert found["global_step"] == wanted["global_step"] == 8
    assert all(torch.equal(found["state_dict"][name], value) for name, value in wanted["state_dict"].items())


@pytest.mark.slow
def test_two_processes_train_on_a_backbone_of_timm_and_go_on_where_they_were_stopped(shapes, tmp_path):
    backbone = "--model.backbone timm/mobilenetv3_small_050 --model.trainable_layers 2 --model.freeze_batch_norm true"
    options = f"{OPTIONS} {PAIR} {backbone} --data.root {shapes} --trainer.max_epochs 1 --last.every_n_steps 2"
    run(["fit", *f"{options} --run_dir {tmp_path}/whole".split()], processes=2)
    options = f"{options} --run_dir {tmp_path}/stopped --ckpt_path last".split()
    stopper = ["--trainer.callbacks+=tests.training.recording.Stopper", "--trainer.callbacks.step", "2"]
    run(["fit", *options, *stopper], processes=2, succeeds=False)
    assert "Resuming from" in run(["fit", *options], processes=2)
    found, wanted = (
        torch.load(tmp_path / name / "version_0/checkpoints/last.ckpt", weights_only=True)
        for name in ("stopped", "whole")
    )
    assert found["global_step"] == wanted["global_step"] == 4
    assert all(torch.equal(found["state_dict"][name], value) for name, value in wanted["state_dict"].items())
    model = build_detector("FasterRCNN", 4, backbone="timm/mobilenetv3_small_050", fpn_channels=32, trainable_layers=2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(wanted["optimizer_states"][0]["state"]) == trained < len(list(model.parameters()))
    moved = [name for name, value in wanted["state_dict"].items() if "running" in name and (value != value[0]).any()]
    assert not moved  # the statistics of frozen norms
