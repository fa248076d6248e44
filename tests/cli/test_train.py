import csv
import functools
import json
import re
import shutil
import warnings

import lightning as L
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from detmix.cli.train import NOISE, DetectorCLI
from detmix.training.build import build_detector
from detmix.training.module import COCO_FIGURES, DetectorModule
from detmix.training.records import read_record
from tests.cli.commands import CONFIGS, DEMO, QUICK, SMALL, command, failure
from tests.conftest import draw_truncated

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in NOISE),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # of Lightning's use
]


def read_log(run):
    """The rows of the metrics of a run."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """The folder that a short training made."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        command(patch, "train.py", f"fit --config {DEMO} --data.root {shapes} --run_dir {folder} {SMALL} {QUICK}")
    return folder / "version_0"


def test_a_run_writes_its_config_logs_checkpoints_and_pictures(run):
    assert (run / "config.yaml").is_file()
    assert list(run.glob("events.out.tfevents.*"))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    for name in ("mixed", "train", "curves", "predictions"):
        pixels = np.asarray(PIL.Image.open(run / f"pictures/{name}.png"))
        assert pixels.std() > 10, f"{name}.png is blank"
    assert len(read_record(run / "pictures/mixed.json")[0]) == 4


def test_every_term_and_figure_is_in_the_log(run):
    rows = read_log(run)
    found = {key for row in rows for key, value in row.items() if value}
    terms = {
        f"train/{term}" for term in ("loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
    }
    figures = {f"val/{name}" for name in COCO_FIGURES}
    assert terms | figures | {f"val/AP/{name}" for name in ("circle", "square", "triangle")} <= found
    assert sum(bool(row["train/loss"]) for row in rows) == 4  # 2 epochs of 8 images at batch 4


def test_a_checkpoint_loads_into_the_plain_torchvision_model(run):
    path = run / "checkpoints/best.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    consume_prefix_in_state_dict_if_present(state, "model.")
    model = build_detector("FasterRCNN", 4, backbone="resnet18", fpn_channels=32)
    model.load_state_dict(state, strict=True)
    module = DetectorModule.load_from_checkpoint(path, weights_only=True)
    assert module.class_names == ["circle", "square", "triangle"]
    assert all(torch.equal(value, state[key]) for key, value in module.model.state_dict().items())


@pytest.mark.parametrize(("every", "expected"), [(1, "best.ckpt"), (2, None)])
def test_fit_ends_with_the_figures_of_the_best_checkpoint_if_there_is_one(
    every, expected, shapes, monkeypatch, tmp_path
):
    validated = []

    @functools.wraps(L.Trainer.validate)  # the command line reads its signature
    def validate(*_, ckpt_path, **__):
        validated.append(ckpt_path)

    monkeypatch.setattr(L.Trainer, "validate", validate)
    short = f"--trainer.max_epochs 1 --trainer.check_val_every_n_epoch {every}"
    line = f"fit --config {DEMO} --data.root {shapes} --run_dir {tmp_path} {SMALL} {QUICK} {short}"
    command(monkeypatch, "train.py", line)
    assert validated == [expected and str(tmp_path / "version_0/checkpoints" / expected)]


def test_validate_gives_the_ap_the_checkpoint_had_and_overwrites_nothing(run, monkeypatch):
    best = f"--ckpt_path {run / 'checkpoints/best.ckpt'}"
    kept = (run / "metrics.csv").read_bytes()
    command(monkeypatch, "train.py", f"validate --config {run / 'config.yaml'} {best}")
    aps = [float(row["val/AP"]) for row in read_log(run) if row["val/AP"]]
    assert float(read_log(run.parent / "version_1")[-1]["val/AP"]) == pytest.approx(max(aps), abs=1e-6)
    assert (run / "metrics.csv").read_bytes() == kept


def test_a_saved_config_starts_another_run_beside_its_own(shapes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    short = "--trainer.max_epochs 1 --trainer.limit_train_batches 1 --trainer.limit_val_batches 1"
    command(monkeypatch, "train.py", f"fit --config {DEMO} --data.root {shapes} {SMALL} {QUICK} {short}")
    command(monkeypatch, "train.py", "validate --config runs/demo/version_0/config.yaml")
    assert sorted(path.name for path in (tmp_path / "runs/demo").iterdir()) == ["version_0", "version_1"]
    assert not (tmp_path / "runs/config").exists()


def test_training_goes_on_from_a_checkpoint(run, monkeypatch, tmp_path):
    last = f"--ckpt_path {run / 'checkpoints/last.ckpt'}"
    line = f"fit --config {run / 'config.yaml'} {last} --run_dir {tmp_path} --trainer.max_epochs 3"
    command(monkeypatch, "train.py", line)
    rows = read_log(tmp_path / "version_0")
    assert {row["epoch"] for row in rows if row["train/loss"]} == {"2"}


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line_and_a_record_to_replay(shapes, monkeypatch, tmp_path):
    wild = "--model.lr 1e30 --model.warmup_steps 0"
    line = f"fit --config {DEMO} --data.root {shapes} --run_dir {tmp_path} {SMALL} {QUICK} {wild}"
    with pytest.raises(
        SystemExit, match=r"^error: The loss is not finite at step \d, images .*: .*nan.*; see .*json"
    ) as end:
        command(monkeypatch, "train.py", line)
    assert "\n" not in str(end.value)
    (record,) = (tmp_path / "version_0/nonfinite").iterdir()
    replay = f"--config {DEMO} --data.root {shapes} --output {tmp_path / 'again.png'} --replay {record}"
    command(monkeypatch, "preview.py", replay)
    assert (tmp_path / "again.json").read_bytes() == record.read_bytes()


def test_the_same_seed_gives_the_same_losses(run, shapes, monkeypatch, tmp_path):
    command(monkeypatch, "train.py", f"fit --config {DEMO} --data.root {shapes} --run_dir {tmp_path} {SMALL} {QUICK}")
    losses = [
        [row["train/loss"] for row in read_log(folder) if row["train/loss"]] for folder in (run, tmp_path / "version_0")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("--model.detector yolo", "detector must be one of .*, but it is 'yolo'"),
        ("--data.root nowhere", "root nowhere is not a folder"),
        ("--data.train_annotations none.json", "none.json is missing; json files there: .*instances_train.json"),
        ("--data.mixup.inplace true", "inplace of mixup must be false, since images of different sizes"),
        ("--data.mixup.start 9", "stop must be no epoch before start, 9, but it is 4"),
        ("--model.lr fast", "Expected a <class 'float'>. Got value: fast"),
        ("--model.learning_rate 1", "unrecognized arguments: --model.learning_rate"),
        ("--model.lr -1", "lr must be positive, but it is -1.0"),
        ("--model.options.max_sizee 64", "options must be arguments of FasterRCNN, .* did you mean max_size"),
        ("--model.options.num_classes 3", "options must not hold num_classes"),
        ("--data.batch_size 0", "batch_size must be at least 1, but it is 0"),
        ("--data.batch_size 9", "batch_size must be at most the 8 training images, but it is 9"),
        ("--data.num_workers -1", "num_workers must be at least 0, but it is -1"),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(mistake, message, shapes, monkeypatch, capsys):
    said = failure(monkeypatch, capsys, f"fit --config {DEMO} --data.root {shapes} {SMALL} {mistake}")
    assert re.search(message, said)
    assert "Traceback" not in said


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_read_and_names_a_detector_that_can_be_built(config, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "fit", "--config", str(config), "--print_config"])
    with pytest.raises(SystemExit) as exit_info:
        DetectorCLI()
    assert exit_info.value.code == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    model, data = settings["model"], settings["data"]
    names = ("detector", "backbone", "fpn_channels", "options")
    built = {name: model[name] for name in names if name != "detector"}
    with torch.device("meta"):  # which has no values to initialise
        build_detector(model["detector"], 4, **built)
    assert data["mixup"]["class_path"] == "detmix.MixUp"
    assert 0.6 < data["mixup"]["init_args"]["stop"] / settings["trainer"]["max_epochs"] < 1


def test_help_describes_every_option(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "fit", "--help"])
    with pytest.raises(SystemExit):
        DetectorCLI()
    text = capsys.readouterr().out
    for option in (
        "--model.lr",
        "--model.detector",
        "--data.root",
        "--data.mixup",
        "--run_dir",
        "--checkpoint.monitor",
    ):
        assert option in text
    assert "How to mix, and in which epochs. Null trains on unmixed images" in " ".join(text.split())


def test_the_record_of_a_run_is_replayed(run, shapes, monkeypatch, tmp_path):
    record = run / "pictures/mixed.json"
    for config in (DEMO, run / "config.yaml"):
        line = f"--config {config} --data.root {shapes} --replay {record} --output {tmp_path / config.stem}.png"
        command(monkeypatch, "preview.py", line)
        assert (tmp_path / f"{config.stem}.json").read_bytes() == record.read_bytes()


def fit(monkeypatch, root, run_dir, options):
    line = f"fit --config {DEMO} --data.root {root} --run_dir {run_dir} {SMALL} {QUICK} {options}"
    return command(monkeypatch, "train.py", line)


@pytest.mark.parametrize(
    ("names", "summary"),
    [
        pytest.param(
            ["train_00001"], "1 image was skipped, because it could not be read: 2 of train\n", marks=pytest.mark.slow
        ),
        (["train_00001", "val_00001"], "2 images were skipped, because they could not be read: 2 of train, 2 of val\n"),
    ],
)
def test_a_run_goes_on_without_unreadable_images_and_names_each_once(
    names, summary, monkeypatch, tmp_path, recwarn, capsys
):
    root = draw_truncated(tmp_path, *names)
    warnings.filterwarnings("always", "image .* is skipped")
    cli = fit(monkeypatch, root, tmp_path / "runs", "--data.unreadable skip")
    assert cli.trainer.global_step == 4
    assert summary in capsys.readouterr().out
    said = [str(warning.message) for warning in recwarn if "is skipped" in str(warning.message)]
    assert sorted(message.rsplit(":", 1)[0] for message in said) == [
        f"image 2 is skipped: {root / 'images' / name}.png cannot be decoded" for name in names
    ]
    checkpoint = torch.load(tmp_path / "runs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["DetectionData"]["skipped"] == [(name.split("_")[0], 2) for name in names]


def test_batches_without_a_readable_image_do_not_end_a_run(monkeypatch, tmp_path, capsys):
    names = ["train_00000", "train_00001", "val_00000"]
    root = draw_truncated(tmp_path, *names, num_train=2, num_val=2)
    with pytest.warns(UserWarning, match=r"image . is skipped") as said:
        cli = fit(monkeypatch, root, tmp_path / "runs", "--data.unreadable skip --data.batch_size 1")
    assert len([warning for warning in said if "is skipped" in str(warning.message)]) == 3
    assert cli.trainer.global_step == 4
    assert (
        "3 images were skipped, because they could not be read: 1 of train, 2 of train, 1 of val"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_ends_a_run_with_one_line_by_default(num_workers, monkeypatch, tmp_path, capsys):
    root = draw_truncated(tmp_path, "train_00001")
    with pytest.raises(SystemExit) as exit_info:
        fit(monkeypatch, root, tmp_path / "runs", f"--data.num_workers {num_workers}")
    name = re.escape(str(root / "images/train_00001.png"))
    assert re.fullmatch(rf"error: (OSError: )?{name} cannot be decoded: .+", exit_info.value.code)  # of status 1
    assert "Traceback" not in capsys.readouterr().err


STOPPING = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping --trainer.callbacks.monitor val/AP"


def test_early_stopping_stops_a_run(shapes, monkeypatch, tmp_path):
    # An AP cannot rise by 2, so it has not risen after the second epoch of ten.
    options = f"--trainer.max_epochs 10 {STOPPING} --trainer.callbacks.patience 1 --trainer.callbacks.min_delta 2"
    cli = fit(monkeypatch, shapes, tmp_path, f"{options} --trainer.callbacks.mode max")
    assert cli.trainer.current_epoch == 2
    assert {row["epoch"] for row in read_log(tmp_path / "version_0") if row["train/loss"]} == {"0", "1"}
    assert (tmp_path / "version_0/checkpoints/best.ckpt").is_file()


def moved(monkeypatch, shapes, run_dir, options):
    """By how much SGD without decay moved each parameter in one step of learning rate 1, and how many steps it made."""
    started = {}

    def remember(self):
        started.update({name: p.detach().clone() for name, p in self.model.named_parameters()})

    monkeypatch.setattr(DetectorModule, "on_train_start", remember)
    sgd = "--model.optimizer SGD --model.lr 1 --model.weight_decay 0 --model.warmup_steps 0 --model.schedule multistep"
    once = f"--trainer.max_epochs 1 --trainer.check_val_every_n_epoch 2 {sgd} --model.milestones [1]"
    monkeypatch.setattr(L.Trainer, "validate", functools.wraps(L.Trainer.validate)(lambda *_, **__: None))
    cli = fit(monkeypatch, shapes, run_dir, f"{once} {options}")
    found = dict(cli.model.model.named_parameters())
    return {name: found[name].detach() - started[name] for name in found}, cli.trainer.global_step


def norm(changes):
    return float(torch.cat([change.flatten() for change in changes.values()]).norm())


def test_gradients_are_clipped_to_a_norm(shapes, monkeypatch, tmp_path):
    one = "--trainer.limit_train_batches 1"
    free, _ = moved(monkeypatch, shapes, tmp_path, one)
    clipped, _ = moved(monkeypatch, shapes, tmp_path, f"{one} --trainer.gradient_clip_val 0.125")
    assert norm(free) > 0.2
    assert norm(clipped) == pytest.approx(0.125, rel=1e-3)
    assert all(torch.allclose(clipped[name], free[name] * 0.125 / norm(free), atol=1e-5) for name in free)


def test_gradients_are_accumulated_over_batches(shapes, monkeypatch, tmp_path):
    seen = []
    step = DetectorModule.training_step
    monkeypatch.setattr(DetectorModule, "training_step", lambda *args: seen.append(args[2]) or step(*args))
    _, steps = moved(monkeypatch, shapes, tmp_path, "--data.batch_size 2 --trainer.accumulate_grad_batches 2")
    assert (seen, steps) == ([0, 1, 2, 3], 2)
    assert len([row for row in read_log(tmp_path / "version_0") if row["train/loss"]]) == 2


def test_a_run_on_other_classes_starts_from_the_weights_that_fit(run, shapes, monkeypatch, tmp_path, caplog):
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    for path in root.glob("annotations/*.json"):
        content = json.loads(path.read_text())
        content["categories"].append({"id": 9, "name": "star"})
        path.write_text(json.dumps(content))
    started = {}

    def remember(self):
        started.update({name: value.detach().clone() for name, value in self.model.state_dict().items()})

    monkeypatch.setattr(DetectorModule, "on_train_start", remember)
    best = run / "checkpoints/best.ckpt"
    fit(monkeypatch, root, tmp_path / "runs", f"--model.weights {best} --trainer.max_epochs 1")
    source = torch.load(best, weights_only=True)["state_dict"]
    consume_prefix_in_state_dict_if_present(source, "model.")
    head = [
        f"roi_heads.box_predictor.{layer}.{kind}" for layer in ("cls_score", "bbox_pred") for kind in ("weight", "bias")
    ]
    assert started.keys() == source.keys()
    assert [name for name in started if started[name].shape != source[name].shape] == head
    assert len(started[head[0]]) == 5
    assert all(torch.equal(started[name], source[name]) for name in started if name not in head)
    (said,) = (message for message in caplog.messages if "stay as initialised" in message)
    assert said.endswith(f": {', '.join(head)}")
