import itertools
import json
import mmap
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import benchmark
import cv2
import pytest
import torch
from sections import Case, loader, losses

from detmix.datasets.shapes import draw_shapes
from tests.conftest import DEVICES
from tests.tools.tiny import SIZES

ROOT = Path(__file__).parents[2]
MACHINE = {"date", "python", "detmix", "torch", "torchvision", "transformers", "numpy", "opencv", "pillow", "device"}


def command(monkeypatch, line):
    monkeypatch.setattr("sys.argv", ["benchmark.py", *shlex.split(line)])
    benchmark.main()


def failure(monkeypatch, capsys, line):
    with pytest.raises(SystemExit) as exit_info:
        command(monkeypatch, line)
    assert exit_info.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    return said


@pytest.mark.parametrize("device", DEVICES)
def test_every_case_has_rows_and_an_entry(device, monkeypatch, capsys, tmp_path):
    sections = " ".join(benchmark.SECTIONS)
    command(monkeypatch, f"{sections} --rounds 1 --device {device} --json {tmp_path / 'out.json'}")
    header, *lines = capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "out.json").read_text())
    cases = written.pop("cases")
    assert written.keys() == MACHINE | {"threads", "rounds"}
    assert (written["torch"], written["threads"], written["rounds"]) == (torch.__version__.split("+")[0], 1, 1)
    assert written["opencv"] == cv2.__version__
    assert torch.get_num_threads() == cv2.getNumThreads() == 1
    assert header == ", ".join(f"{key} {value}" for key, value in written.items())
    assert [(case["section"], case["case"]) for case in cases] == [(s, n) for s in benchmark.SECTIONS for n in SIZES[s]]
    lines = iter(lines)
    for number, case in enumerate(cases):
        if not number or case["section"] != cases[number - 1]["section"]:
            assert next(lines) == ""
            heads = [case["section"], "ms", "beside", "ms", "ratio of medians", "median ratio", "page faults"]
            assert re.split("  +", next(lines)) == heads
        assert next(lines) == f"{case['case']}: {case['sizes']}"
        for comparison in case["comparisons"]:
            one, other = (case["runs"][comparison[key]]["median_ms"] for key in ("run", "beside"))
            assert comparison["ratio_of_medians"] == comparison["median_ratio"] == pytest.approx(one / other)
            ratio = f"{comparison['ratio_of_medians']:.3f}"
            shown = [comparison["run"], f"{one:.3f}", comparison["beside"], f"{other:.3f}", ratio, ratio]
            faults = (case["runs"][comparison[key]]["page_faults"] for key in ("run", "beside"))
            shown.append(" and ".join(f"{number:,.0f}" for number in faults))
            assert re.split("  +", next(lines).strip())[:7] == shown
    assert next(lines, None) is None


def test_threads_are_those_of_torch_and_of_opencv(monkeypatch, tmp_path):
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    command(monkeypatch, f"mix --rounds 1 --threads 2 --json {tmp_path / 'out.json'}")
    assert json.loads((tmp_path / "out.json").read_text())["threads"] == 2
    assert torch.get_num_threads() == cv2.getNumThreads() == 2


@pytest.mark.parametrize(
    ("line", "sizes"),
    [
        pytest.param(
            "losses --cases FCOS",
            "2 x 22,400 anchors x 91 classes, 16 boxes an image",
            marks=pytest.mark.slow,
        ),
        (
            'mix --cases "float16 CHW"',
            "480 x 640 and 640 x 480 on 640 x 640 pixels, 3 channels; copied 1,536,000 values",
        ),
    ],
)
def test_it_runs_as_a_script_at_full_size(line, sizes, tmp_path):
    line = f"tools/benchmark.py {line} --rounds 1 --json {tmp_path / 'out.json'}"
    said = subprocess.run(
        [sys.executable, *shlex.split(line)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (case,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert case["sizes"] == sizes
    assert sizes in said


@pytest.mark.parametrize("names", ["ab", "abc", "abcd"])
def test_runs_take_turns_on_the_same_random_numbers(names, monkeypatch):
    now, log, drawn = [0.0], [], []
    seconds = {name: number for number, name in enumerate(names, 1)}

    def taking(name):
        def run():
            now[0] += 100 if len(drawn) < benchmark.WARMUP_ROUNDS * len(names) else seconds[name]
            log.append(name)
            drawn.append(torch.rand(()).item())

        return run

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    case = Case("", {name: taking(name) for name in names}, prepare=lambda: log.append("prepare"))
    rounds = 40
    turns = benchmark.interleave(case, rounds, lambda: log.append("wait"))
    assert {n: [turn.seconds for turn in taken] for n, taken in turns.items()} == {
        n: [s] * rounds for n, s in seconds.items()
    }
    rounds += benchmark.WARMUP_ROUNDS
    assert log[::4] == ["prepare"] * len(names) * rounds
    assert log[1::4] == log[3::4] == ["wait"] * len(names) * rounds
    orders = ["".join(log[2::4])[i * len(names) :][: len(names)] for i in range(rounds)]
    assert all(set(order) == set(names) for order in orders)
    assert all(one == other[::-1] for one, other in zip(orders[::2], orders[1::2], strict=True))
    assert {(a, b) for a in names for b in names if a != b} == {
        pair for order in orders for pair in itertools.pairwise(order)
    }
    assert len(set(drawn)) == rounds
    assert all(len(set(drawn[i * len(names) :][: len(names)])) == 1 for i in range(rounds))


def test_short_runs_are_called_until_a_turn_is_over(monkeypatch):
    now, calls = [0.0], []

    def run():
        now[0] += 0.0005 if calls else 0.1  # the first finds nothing ready
        calls.append(0)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    case = Case("", {"run": run})
    turns = benchmark.interleave(case, 3, lambda: None)["run"]
    assert [turn.seconds for turn in turns] == [pytest.approx(0.0005)] * 3
    assert len(calls) == benchmark.WARMUP_ROUNDS + 4 * 3


@pytest.mark.alone
@pytest.mark.skipif(benchmark.resource is None, reason="the system does not count page faults")
def test_page_faults_are_those_of_a_call():
    held = mmap.mmap(-1, 100 * mmap.PAGESIZE)

    def touch():
        held.madvise(mmap.MADV_DONTNEED)
        held[:] = bytes(len(held))

    turns = benchmark.interleave(Case("", {"touch": touch, "rest": lambda: None}), 3, lambda: None)
    assert all(100 <= turn.page_faults < 200 for turn in turns["touch"])
    assert all(turn.page_faults < 20 for turn in turns["rest"])


def test_a_summary_holds_medians_and_both_ratios():
    times = {"a": [0.002, 0.003, 0.012], "b": [0.001, 0.002, 0.004], "c": [0.001] * 3}
    turns = {name: [benchmark.Turn(s, 7 * i) for i, s in enumerate(taken)] for name, taken in times.items()}
    runs = dict.fromkeys(times, int)
    found = benchmark.summarize(Case("", runs), turns)
    assert found["runs"] == {
        name: {"median_ms": pytest.approx(ms), "page_faults": 7} for name, ms in (("a", 3), ("b", 2), ("c", 1))
    }
    assert found["comparisons"] == [
        {"run": "a", "beside": "b", "ratio_of_medians": pytest.approx(1.5), "median_ratio": pytest.approx(2.0)},
        {"run": "a", "beside": "c", "ratio_of_medians": pytest.approx(3.0), "median_ratio": pytest.approx(3.0)},
    ]
    found = benchmark.summarize(Case("", runs, [("b", "c")], "box", {"b": 4, "c": 1}), turns)
    (comparison,) = found["comparisons"]
    assert (comparison["run"], comparison["beside"]) == ("b", "c")
    assert [run.get("ns_per_box") for run in found["runs"].values()] == [None, pytest.approx(5e5), pytest.approx(1e6)]


def test_it_waits_for_a_cuda_device(monkeypatch):
    waits = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "one that is not there")
    monkeypatch.setattr("torch.cuda.synchronize", lambda: waits.append(0))
    build = losses.SECTION.cases["FCOS"]
    monkeypatch.setitem(losses.SECTION.cases, "FCOS", lambda _: build(torch.device("cpu")))
    command(monkeypatch, "losses --rounds 1 --cases FCOS --device cuda")
    assert len(waits) == 4 * (1 + benchmark.WARMUP_ROUNDS)


@pytest.mark.parametrize("section", ["losses", "step"])
@pytest.mark.parametrize("package", ["transformers", "scipy"])
def test_a_case_is_skipped_without_its_package(package, section, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    line = f"{section} --rounds 1 --json {tmp_path / 'out.json'} --cases RTDetr"
    command(monkeypatch, f"{line} FCOS")
    written = json.loads((tmp_path / "out.json").read_text())
    assert [case["case"] for case in written["cases"]] == ["FCOS"]
    assert (written["transformers"] is None) == (package == "transformers")
    assert "\nRTDetr: skipped: pip install 'detmix[transformers]'\n" in capsys.readouterr().out
    assert failure(monkeypatch, capsys, line) == "error: no case could be run"


def test_root_is_what_loader_reads(monkeypatch, capsys, tmp_path):
    root = draw_shapes(tmp_path / "shapes", num_train=3, num_val=1)
    command(monkeypatch, f"loader --rounds 1 --root {root}")
    assert capsys.readouterr().out.count("3 images of shapes, batches of 3") == 4


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_drawn_is_deleted(fails, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    passes = []

    def pass_over(_):
        passes.append([*tmp_path.glob("*/images/*.jpg")])
        if fails:
            raise KeyboardInterrupt

    monkeypatch.setattr(loader, "pass_over", pass_over)
    try:
        command(monkeypatch, "loader --rounds 1")
    except KeyboardInterrupt:
        assert fails
    assert len(passes[0]) == 6
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: section"),
        ("gains", "argument section: invalid choice: 'gains' .*losses.*"),
        ("losses --cases YOLO", "argument --cases: YOLO is not one of RetinaNet, FCOS, FasterRCNN, RTDetr"),
        ("losses --rounds 0", "argument --rounds: expected a whole number of at least 1, but it is '0'"),
        ("losses --rounds -1", "argument --rounds: expected a whole number of at least 1, but it is '-1'"),
        ("losses --threads 1.5", "argument --threads: expected a whole number of at least 1, but it is '1.5'"),
        ("losses --json no/out.json", "argument --json: no/out.json cannot be written; is its folder there[?]"),
        ("losses --json .", "argument --json: expected a file, but . is a folder"),
        ("losses --device cuda", "argument --device: there is no CUDA device"),
        ("losses --device tpu", "argument --device: invalid choice: 'tpu' .*cuda.*"),
        ("loader --root no", "argument --root: root no is not a folder."),
        ("loader --root .", "argument --root: annotations .*instances_train.json is missing; .*"),
        ("mix batch --root shapes", "argument --root: mix, batch reads no images"),
    ],
)
def test_a_mistake_is_one_line(line, message, monkeypatch, capsys, tmp_path):
    draw_shapes(tmp_path / "shapes", num_train=1, num_val=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert re.fullmatch(f"error: {message}", failure(monkeypatch, capsys, line))


def test_help_and_mistakes_do_not_wait_for_torch():
    code = "import sys, benchmark; benchmark.make_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", check=True)
