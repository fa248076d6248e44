import itertools
import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from sections import batch, growth, inputs, loader, mix, step

import detmix
from detmix import functional
from detmix.datasets.coco import images as coco
from detmix.datasets.shapes import draw_shapes
from tests.conftest import DEVICES, assert_same
from tests.tools.tiny import SIZES

ROOT = Path(__file__).parents[2]
ON_EVERY_DEVICE = pytest.mark.parametrize("device", DEVICES)
TENSORS = [name for name in SIZES["batch"] if name.split()[0] not in ("list", "targets")]
LISTS = [name for name in SIZES["batch"] if name.startswith("list")]


def blend(first, second, lam):
    """By the definition: float64, nothing rounded."""
    height, width = (max(sides) for sides in zip(first.shape[1:], second.shape[1:], strict=True))
    canvas = torch.zeros(len(first), height, width, dtype=torch.float64, device=first.device)
    canvas[:, : first.shape[1], : first.shape[2]] += lam * first.double()
    canvas[:, : second.shape[1], : second.shape[2]] += (1 - lam) * second.double()
    return canvas


def assert_near(mixed, expected, dtype, levels=0.5):
    """Equal but for rounding; integers, for so many levels."""
    assert mixed.dtype == dtype
    assert mixed.shape == expected.shape
    errors = {torch.float32: 1e-6, torch.float16: 1e-3, torch.uint8: levels + 1e-4}
    assert (mixed.double() - expected).abs().max() <= errors[dtype]


def bytes_moved(run):
    """Of a copy: what it reads and what it writes."""
    out = run()
    assert out.data_ptr() == run().data_ptr()
    return 2 * out.nbytes


# mix


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", SIZES["mix"])
def test_all_ways_to_blend_a_pair_agree(name, device, build):
    runs = build(mix, name, device).runs
    first, second, lam = runs["detmix"].args
    expected = blend(first, second, lam)
    assert_near(runs["detmix"](), expected, first.dtype)
    numbered = {"numpy float32": 1.0, "plain float32": 0.5, "addWeighted": 0.5}
    for other in runs.keys() & numbered.keys():
        mixed = torch.as_tensor(runs[other]())
        if other == "addWeighted":
            mixed = mixed.permute(2, 0, 1) if "HWC" in name else mixed.view(expected.shape)
        assert_near(mixed, expected, first.dtype, numbered[other])
    own = {"numpy float32"} | ({"addWeighted"} if first.dtype == torch.uint8 else set())
    assert runs.keys() == {"detmix", "copy"} | (own if device == "cpu" else {"plain float32"})


@pytest.mark.parametrize("name", SIZES["mix"])
def test_images_and_canvas_have_the_layout_that_the_case_is_called_by(name, build):
    runs = build(mix, name).runs
    images = *runs["detmix"].args[:2], torch.as_tensor(runs["numpy float32"]())
    for image in images:
        assert (image.permute(1, 2, 0) if "HWC" in name else image).is_contiguous()
    if "addWeighted" in runs:
        first, _, second, *_ = runs["addWeighted"].args
        assert all(array.flags.c_contiguous for array in (first, second))
        assert not any(array.flags.owndata for array in (first, second))


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", SIZES["mix"])
def test_the_copy_moves_what_a_blend_reads_and_writes(name, device, build):
    case = build(mix, name, device)
    first, second, _ = case.runs["detmix"].args
    moved = first.nbytes + second.nbytes + case.runs["detmix"]().nbytes
    assert bytes_moved(case.runs["copy"]) == moved
    assert case.sizes.endswith(f"copied {moved // first.itemsize // 2:,} values")


def test_add_weighted_is_opencvs_own_call(build):
    assert build(mix, "uint8 CHW").runs["addWeighted"].func is cv2.addWeighted


# batch


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", TENSORS)
def test_all_ways_to_mix_a_batch_agree(name, device, build):
    case = build(batch, name, device)
    given = [case.runs["copy"]().clone() for _ in range(SIZES["batch"][name].get("batches", 1))]
    assert all(not torch.equal(*pair) for pair in itertools.combinations(given, 2))
    turns = itertools.cycle(given)  # each run takes the next

    images = next(turns)
    lams = torch.linspace(0.1, 0.9, len(images)).tolist()
    expected = torch.stack([blend(images[i], images[i + 1 - len(images)], lam) for i, lam in enumerate(lams)])
    mixed = case.runs["detmix"]()
    assert_near(mixed, expected, images.dtype)
    assert torch.equal(case.runs["copy"](), mixed if "inplace" in name else next(turns))
    case.prepare()
    assert torch.equal(case.runs["copy"](), next(turns))

    pairs = zip(next(turns), given[0].roll(1, 0), strict=True)
    expected = torch.stack([blend(*pair, batch.LAM) for pair in pairs])
    assert_near(case.runs["fresh lerp" if images.is_floating_point() else "via float"](), expected, images.dtype)
    assert len(case.runs) == 4 + images.is_floating_point()
    if images.is_floating_point():
        mixed, labels = case.runs["v2.MixUp"]()
        assert (mixed.shape, mixed.dtype) == (images.shape, images.dtype)
        assert labels.shape == (len(images), inputs.CLASSES)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", TENSORS)
def test_copies_move_each_byte_of_a_batch_once_and_half_as_many_more(name, device, build):
    case = build(batch, name, device)
    size = case.runs["detmix"]().nbytes
    assert bytes_moved(case.runs["copy"]) == 2 * size
    assert bytes_moved(case.runs["copy of as many bytes"]) == 3 * size


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", LISTS)
def test_lists_hold_images_of_many_sizes_and_are_mixed_alike(name, device, build):
    runs = build(batch, name, device).runs
    images, targets = runs["detmix"]()
    plain = runs["plain float32"]()
    assert len({image.shape for image in images}) > 1
    for image, expected in zip(images, plain, strict=True):
        assert_near(image, expected.double(), image.dtype, levels=1)
    assert all(len(target["boxes"]) == 2 * batch.BOXES for target in targets)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", LISTS)
def test_the_copy_moves_what_mixing_a_list_reads_and_writes(name, device, build, monkeypatch):
    runs = build(batch, name, device).runs
    canvases, _ = runs["detmix"]()
    monkeypatch.setattr(functional, "mixup_batch", lambda images, *_: images)
    moved = [*canvases, *runs["detmix"](), *runs["detmix"]()]  # each image is read twice
    assert bytes_moved(runs["copy of as many bytes"]) == sum(image.nbytes for image in moved)


@ON_EVERY_DEVICE
def test_all_ways_to_join_targets_agree(device, build):
    runs = build(batch, "targets", device).runs
    _, mixed = runs["detmix"]()
    for one, deep, plain in zip(mixed, runs["deepcopy"](), runs["torch.cat"](), strict=True):
        assert len(one["boxes"]) == 2 * batch.BOXES
        assert_same({key: one[key] for key in plain}, plain)
        assert_same({key: deep[key] for key in plain}, plain)
        assert deep["mixup"].shape == one["weights"].shape
        assert deep["mixup"].device == one["weights"].device


# growth


@ON_EVERY_DEVICE
def test_boxes_grow_as_the_names_say(device, build):
    case = build(growth, "boxes", device)
    for name, run in case.runs.items():
        images, targets = run()
        assert images.shape[2:] == (1, 1)
        assert {len(target["boxes"]) for target in targets} == {2 * int(name.split()[0])}
        assert case.units[name] == len(images) * int(name.split()[0])


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", ["pixels uint8", "pixels float32"])
def test_pixels_grow_as_the_names_say(name, device, build):
    case = build(growth, name, device)
    for run_name, run in case.runs.items():
        image, side = run(), int(re.match(r"\d+", run_name)[0])
        assert image.shape == (3, side, side)
        assert str(image.dtype) == f"torch.{name.split()[1]}"
        assert case.units[run_name] == side**2


@pytest.mark.parametrize("name", SIZES["growth"])
def test_each_size_is_compared_with_the_one_before(name, build):
    case = build(growth, name)
    sizes = [run for run in case.runs if "clone" not in run]
    compared = [pair for pair in case.comparisons if "clone" not in pair[1]]
    assert compared == [(larger, smaller) for smaller, larger in itertools.pairwise(sizes)]
    amounts = [case.units[size] for size in sizes]
    assert amounts == sorted(set(amounts))
    copied = [pair for pair in case.comparisons if "clone" in pair[1]]
    assert len(copied) == (0 if name == "boxes" else len(sizes))
    assert all(case.units[one] == case.units[other] for one, other in copied)


# loader


def batches_of(run):
    torch.manual_seed(0)
    return list(*run.args)


@pytest.mark.parametrize("name", SIZES["loader"])
def test_the_same_images_are_loaded_mixed_or_not(name, build):
    runs = build(loader, name).runs
    plain, mixed, dataset = (batches_of(runs[name]) for name in ("no mixing", "in-batch MixUp", "MixUpDataset p=0.5"))
    assert sum(len(images) for images, _ in plain) == 6
    assert all(images.shape == (3, 3, 48, 64) for images, _ in plain)
    for (images, targets), (mixed_images, mixed_targets) in zip(plain, mixed, strict=True):
        assert "weights" not in targets[0]
        assert all(target["partner"] >= 0 for target in mixed_targets)
        plan = [functional.Mix.of(target) for target in mixed_targets]
        assert_same((mixed_images, mixed_targets), functional.mixup_batch(images, targets, plan))
    assert [ids(batch) for batch in dataset] == [ids(batch) for batch in plain]
    assert all("weights" in target for _, targets in dataset for target in targets)
    assert runs["MixUpDataset p=0.5"].args[0].dataset.mixup.p == 0.5


def ids(loaded):
    return [target["image_id"] for target in loaded[1]]


@pytest.mark.parametrize("mixup", [None, detmix.MixUp(seed=0)])
def test_images_of_different_sizes_stay_a_list(mixup):
    sizes = ((4, 6), (5, 3), (4, 6))
    samples = [(torch.rand(3, *size), {"boxes": torch.zeros(0, 4)}) for size in sizes]
    images, targets = loader.Collate(mixup)(samples)
    assert not isinstance(images, torch.Tensor)
    assert len(targets) == 3
    if mixup is None:
        assert all(one is other for one, (other, _) in zip(images, samples, strict=True))
    else:
        assert {tuple(image.shape) for image in images} > {(3, 5, 6)}


@pytest.mark.parametrize("name", ["no mixing", "in-batch MixUp"])
def test_workers_write_into_shared_memory(name, build, monkeypatch):
    (loaded,) = build(loader, "0 workers").runs[name].args
    samples = [loaded.dataset[i] for i in range(3)]
    for worker in (None, 0):
        monkeypatch.setattr(loader, "get_worker_info", lambda worker=worker: worker)
        images, _ = loaded.collate_fn(samples)
        assert images.is_shared() == (worker is not None)


def test_pillow_reads_the_same_pixels_where_it_is_to(build, monkeypatch):
    calls, decode = [], coco.decode_jpeg
    monkeypatch.setattr(coco, "decode_jpeg", lambda *args: calls.append(0) or decode(*args))
    ours, pillows = (batches_of(build(loader, name).runs["no mixing"]) for name in ("0 workers", "0 workers Pillow"))
    assert_same(pillows, ours)
    assert len(calls) == 6


def test_a_pass_takes_every_batch_and_starts_anew(build):
    run = build(loader, "2 workers").runs["no mixing"]
    (loaded,) = run.args
    run()
    workers = [worker.pid for worker in loaded._iterator._workers]
    run()
    assert [worker.pid for worker in loaded._iterator._workers] == workers
    assert loaded._iterator._num_yielded == len(loaded) == 2
    assert isinstance(loaded.sampler, torch.utils.data.RandomSampler)


def test_drawn_jpegs_are_as_large_as_photographs(tmp_path):
    loader.draw_folder(tmp_path, 3, (480, 640))
    assert all(20_000 < path.stat().st_size < 60_000 for path in (tmp_path / "images").iterdir())


def test_of_a_large_folder_some_images_are_read(build, monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "MOST", 4)
    root = draw_shapes(tmp_path / "shapes", num_train=5, num_val=1)
    case = build(loader, "0 workers", root=root)
    assert case.sizes == "4 images of shapes, batches of 3"
    assert sum(len(targets) for _, targets in batches_of(case.runs["no mixing"])) == 4


# step


def seeded(run):
    torch.manual_seed(0)
    return run()


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", SIZES["step"])
def test_steps_differ_by_what_detmix_adds_alone(name, device, build):
    runs = build(step, name, device).runs
    stock = seeded(runs["stock"])
    assert torch.isfinite(stock)
    assert stock != seeded(runs["weighted"])
    assert torch.equal(seeded(runs["mix + weighted"]), seeded(runs["weighted"]))
    images, targets = runs["weighted"].args[2]()
    assert runs["stock"].args[2]()[0] is images
    assert all(len(target["boxes"]) == 2 * step.BOXES for target in targets)
    for target in targets:
        target["weights"].fill_(1)
    assert torch.equal(seeded(runs["weighted"]), stock)


@pytest.mark.parametrize("name", SIZES["step"])
def test_each_run_trains_a_model_of_its_own_that_does_not_change(name, build):
    runs = build(step, name).runs
    seen = set()
    for run_name, run in runs.items():
        model, optimizer, _ = run.args
        before = [parameter.clone() for parameter in model.parameters()]
        run()
        assert model.training
        assert any(state["momentum_buffer"].any() for state in optimizer.state.values())
        assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
        is_ours = any(type(m).__module__.startswith("detmix") for m in [*model.modules(), *loss_functions(model)])
        assert is_ours == (run_name != "stock")
        assert seen.isdisjoint(model.parameters())
        seen.update(model.parameters())


def loss_functions(model):
    return filter(None, [getattr(model, "loss_function", None)])


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES["step"])
def test_steps_run_at_full_size(name):
    line = [sys.executable, "tools/benchmark.py", "step", "--rounds", "1", "--cases", name]
    said = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"\n{name}: 2 x 3 x 256 x 320, 16 boxes an image\n" in said
