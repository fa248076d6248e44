import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import benchmark
import pytest
import torch
from benchmarks import Case, losses
from torch import nn
from transformers.models.rt_detr.modeling_rt_detr import get_contrastive_denoising_training_group

from tests.conftest import DEVICES, assert_same

ROOT = Path(__file__).parents[2]
TINY = {
    "RetinaNet": {"size": (64, 96)},
    "FCOS": {"size": (64, 96)},
    "FasterRCNN": {"size": (64, 96)},
    "RTDetr": {"decoder_layers": 2, "num_queries": 20, "num_denoising": 40},
}
VERSIONS = {"detmix", "torch", "torchvision", "transformers"}
SPEEDS = {"reference_ms", "candidate_ms", "ratio_of_medians", "median_ratio"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The cases at sizes that take no time; and as many threads after a test as before it."""
    for name, sizes in TINY.items():
        case = functools.partial(losses.SECTION.cases[name], **sizes)
        monkeypatch.setitem(losses.SECTION.cases, name, case)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def command(monkeypatch, line):
    monkeypatch.setattr("sys.argv", ["benchmark.py", *line.split()])
    benchmark.main()


def failure(monkeypatch, capsys, line):
    with pytest.raises(SystemExit) as exit_info:
        command(monkeypatch, line)
    assert exit_info.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    return said


def seeded(function):
    torch.manual_seed(0)
    return function()


@pytest.mark.parametrize("device", DEVICES)
def test_every_case_has_a_row_and_an_entry(device, monkeypatch, capsys, tmp_path):
    command(monkeypatch, f"losses --rounds 3 --threads 2 --device {device} --json {tmp_path / 'out.json'}")
    header, _, heads, *rows = capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "out.json").read_text())
    cases = written.pop("cases")
    assert written.keys() == VERSIONS | {"device", "threads", "rounds"}
    assert (written["torch"], written["threads"], written["rounds"]) == (torch.__version__.split("+")[0], 2, 3)
    assert torch.get_num_threads() == 2
    assert header == ", ".join(f"{key} {value}" for key, value in written.items())
    assert heads.split("  ")[-5:] == ["stock ms", "weighted ms", "ratio of medians", "median ratio", "sizes"]
    assert [case["case"] for case in cases] == list(TINY)
    for case, row in zip(cases, rows, strict=True):
        assert case.keys() == {"section", "case", "sizes"} | SPEEDS
        assert case["section"] == "losses"
        assert case["ratio_of_medians"] == pytest.approx(case["candidate_ms"] / case["reference_ms"])
        assert row.split()[:2] == [case["case"], f"{case['reference_ms']:.3f}"]
        assert row.endswith(f"  {case['sizes']}")


def test_it_runs_as_a_script_at_full_size(tmp_path):
    line = f"tools/benchmark.py losses --cases FCOS --rounds 1 --json {tmp_path / 'out.json'}"
    said = subprocess.run([sys.executable, *line.split()], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (case,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert case["sizes"] == "2 x 22,400 anchors x 91 classes, 16 boxes an image"
    assert case["sizes"] in said


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("RetinaNet", {"size": (640, 640)}, "2 x 76,725 anchors x 91 classes"),
        ("FasterRCNN", {"size": (800, 1344)}, "2 x 268,569 anchors, 2 x 512 proposals x 91 classes"),
        (
            "RTDetr",
            {"decoder_layers": 6, "num_queries": 300, "num_denoising": 100},
            "8 x (300 + 192 denoising) queries x 80 classes, 6 layers + encoder",
        ),
    ],
)
def test_sizes_are_those_of_what_is_computed(name, options, sizes):
    assert losses.SECTION.cases[name](torch.device("cpu"), **options).sizes == f"{sizes}, 16 boxes an image"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TINY)
def test_stock_and_weighted_differ_by_the_weights_alone(name, device):
    case = losses.SECTION.cases[name](torch.device(device))
    model, _ = case.reference.args
    held = [*model.modules(), getattr(model, "loss_function", None)]
    assert not any(type(part).__module__.startswith("detmix") for part in held)
    stock = seeded(case.reference)
    assert torch.isfinite(stock)
    assert seeded(case.candidate) < stock
    _, targets = case.candidate.args
    for target in targets:
        target["weights"].fill_(1)
    assert torch.equal(seeded(case.candidate), stock)


def test_denoising_queries_are_those_of_the_model():
    case = losses.SECTION.cases["RTDetr"](torch.device("cpu"))
    model, labels = case.reference.args
    loss, config = model.loss_function, model.config
    model.loss_function = mock.Mock(side_effect=loss)
    case.reference()
    given = model.loss_function.call_args.kwargs["denoising_meta_values"]
    embed = nn.Embedding(config.num_labels + 1, 4)
    *_, made = get_contrastive_denoising_training_group(
        labels, config.num_labels, config.num_queries, embed, config.num_denoising
    )
    assert_same(given, {**made, "dn_positive_idx": list(made["dn_positive_idx"])})


@pytest.mark.parametrize("name", TINY)
def test_losses_run_backward_to_every_output(name, monkeypatch):
    gradients = []
    grad = torch.autograd.grad
    monkeypatch.setattr("torch.autograd.grad", lambda *args: gradients.append(grad(*args)))
    case = losses.SECTION.cases[name](torch.device("cpu"))
    seeded(case.reference), seeded(case.candidate)
    stock, weighted = gradients
    for one, other in zip(stock, weighted, strict=True):
        assert one.any()
        assert not torch.equal(one, other)


def test_both_run_in_turns_on_the_same_random_numbers(monkeypatch):
    now, log, drawn = [0.0], [], []

    def taking(seconds, name):
        def run():
            now[0] += 100 if len(log) < 6 * benchmark.WARMUP_ROUNDS else seconds
            log.append(name)
            drawn.append(torch.rand(()).item())

        return run

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    case = Case("", taking(1, "reference"), taking(3, "candidate"))
    taken = benchmark.interleave(case, 3, lambda: log.append("wait"))
    assert taken == ([1.0] * 3, [3.0] * 3)
    rounds = 3 + benchmark.WARMUP_ROUNDS
    assert log[::3] == log[2::3] == ["wait"] * 2 * rounds
    assert log[1::3] == [("reference", "candidate")[(i + i // 2) % 2] for i in range(2 * rounds)]
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) == rounds


def test_a_summary_holds_medians_and_both_ratios():
    assert benchmark.summarize([0.001, 0.002, 0.004], [0.002, 0.003, 0.012]) == pytest.approx(
        {"reference_ms": 2.0, "candidate_ms": 3.0, "ratio_of_medians": 1.5, "median_ratio": 2.0}
    )


def test_it_waits_for_a_cuda_device(monkeypatch):
    waits = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "one that is not there")
    monkeypatch.setattr("torch.cuda.synchronize", lambda: waits.append(0))
    build = losses.SECTION.cases["FCOS"]
    monkeypatch.setitem(losses.SECTION.cases, "FCOS", lambda _: build(torch.device("cpu")))
    command(monkeypatch, "losses --rounds 1 --cases FCOS --device cuda")
    assert len(waits) == 4 * (1 + benchmark.WARMUP_ROUNDS)


@pytest.mark.parametrize("package", ["transformers", "scipy"])
def test_a_case_is_skipped_without_its_package(package, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    line = f"losses --rounds 1 --json {tmp_path / 'out.json'} --cases RTDetr"
    command(monkeypatch, f"{line} FCOS")
    written = json.loads((tmp_path / "out.json").read_text())
    assert [case["case"] for case in written["cases"]] == ["FCOS"]
    assert (written["transformers"] is None) == (package == "transformers")
    assert "\nRTDetr      skipped: pip install 'detmix[transformers]'\n" in capsys.readouterr().out
    assert failure(monkeypatch, capsys, line) == "error: no case could be run"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: section"),
        ("gains", "argument section: invalid choice: 'gains' .*losses.*"),
        ("losses --cases YOLO", "argument --cases: YOLO is not one of RetinaNet, FCOS, FasterRCNN, RTDetr"),
        ("losses --rounds 0", "argument --rounds: must be a whole number of at least 1, but is 0"),
        ("losses --rounds -1", "argument --rounds: must be a whole number of at least 1, but is -1"),
        ("losses --threads 1.5", "argument --threads: must be a whole number of at least 1, but is 1.5"),
        ("losses --json no/out.json", "argument --json: no/out.json cannot be written; is its folder there[?]"),
        ("losses --json .", "argument --json: . is a folder"),
        ("losses --device cuda", "argument --device: there is no CUDA device"),
        ("losses --device tpu", "argument --device: invalid choice: 'tpu' .*cuda.*"),
    ],
)
def test_a_mistake_is_one_line(line, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert re.fullmatch(f"error: {message}", failure(monkeypatch, capsys, line))


def test_help_and_mistakes_do_not_wait_for_torch():
    code = "import sys, benchmark; benchmark.make_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", check=True)
