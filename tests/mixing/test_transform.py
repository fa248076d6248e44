import copy
import os
import pickle
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from detmix import MixUp
from detmix.mixing import transform as transforms
from detmix.mixing.batch import mixup_batch
from detmix.mixing.pairing import PAIRINGS
from detmix.mixing.plan import Mix
from tests.conftest import DEVICES, assert_same, make_sample, without_waiting

SIZES = [(12, 16), (9, 20), (12, 16), (20, 8), (5, 5)]
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]


def batch(counts=(2, 0, 3, 1, 0), sizes=SIZES):
    samples = [make_sample(n, size, i) for i, (n, size) in enumerate(zip(counts, sizes, strict=False))]
    return [image for image, _ in samples], [target for _, target in samples]


def plan(mixup, size=6):
    return mixup.make_plan([{}] * size)


def lams(mixup, batches=500, size=8):
    return torch.tensor([mix.lam for _ in range(batches) for mix in plan(mixup, size)], dtype=torch.float64)


@given(
    counts=st.lists(st.integers(0, 3), max_size=5), options=st.sampled_from([{}, {"p": 0.5}, {"box_weights": "first"}])
)
def test_every_target_says_how_its_sample_was_mixed(counts, options):
    images, targets = batch(counts)
    mixed_images, mixed = MixUp(**options)(images, targets)
    assert_same((mixed_images, mixed), mixup_batch(images, targets, [Mix.of(target) for target in mixed]))
    for i, (image, target) in enumerate(zip(mixed_images, mixed, strict=True)):
        j = target["partner"]
        assert j != i
        assert target["canvas"] == image.shape[-2:]
        assert len(target["weights"]) == len(targets[i]["boxes"]) + (len(targets[j]["boxes"]) if j >= 0 else 0)
        assert len({len(target[key]) for key in ("boxes", "labels", "masks", "weights", "source", "area")}) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_each_dtype_mixes_as_a_list_or_a_tensor_without_waiting_for_the_device(device, stacked, dtype, inplace):
    images, targets = batch(sizes=[(12, 16)] * 5 if stacked else SIZES)
    images = [image.as_subclass(torch.Tensor).to(dtype) for image in images]
    params = plan(MixUp(), 5)
    expected_images, expected = mixup_batch([image.double() for image in images], targets, params, fill=3)
    moved = torch.stack(images).to(device) if stacked else [image.to(device) for image in images]
    moved_targets = [
        {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in target.items()}
        for target in targets
    ]
    if inplace and not stacked:
        with pytest.raises(TypeError, match="inplace needs one batch tensor, but images is a list"):
            MixUp(inplace=True)(moved, moved_targets)
        return
    with without_waiting(device):
        out, out_targets = MixUp(fill=3, inplace=inplace)(moved, moved_targets, params)
        MixUp(seed=1)(moved, moved_targets)
    assert isinstance(out, torch.Tensor) == stacked
    for image, exact in zip(out, expected_images, strict=True):
        assert (image.dtype, image.device.type) == (dtype, device)
        rounding = torch.finfo(dtype).eps / 2 * 256 if dtype.is_floating_point else 0.5
        assert (image.cpu().double() - exact).abs().max() <= rounding + 1e-4
    on_host = [{k: v.to("cpu") if isinstance(v, torch.Tensor) else v for k, v in t.items()} for t in out_targets]
    assert_same(on_host, expected)


def test_no_sample_meets_itself_and_each_is_partner_once_by_default():
    for size in (2, 3, 5, 8):
        mixes = plan(MixUp(), size)
        assert sorted(mix.partner for mix in mixes) == list(range(size))
        assert all(mix.partner != i for i, mix in enumerate(mixes))
        assert len({mix.lam for mix in mixes}) == size


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_pairs_are_those_of_the_named_pairing(pairing):
    images, targets = batch((2, 3, 1, 1))
    for target, labels in zip(targets, ([1, 2], [2, 2, 3], [1], [4]), strict=True):
        target["labels"] = torch.tensor(labels)
    _, mixed = MixUp(pairing=pairing, seed=0)(images, targets)
    partners = [target["partner"] for target in mixed]
    assert partners != [-1] * 4
    if pairing == "same_class":
        assert partners[1:] == [0, 0, -1]
    if pairing == "reversal":
        assert partners == [3, 2, 1, 0]


def test_a_pairing_of_the_users_decides():
    images, targets = batch()
    _, mixed = MixUp(pairing=lambda targets, pool, rng: [4, 4, -1, 4, 3])(images, targets)
    assert [target["partner"] for target in mixed] == [4, 4, -1, 4, 3]
    assert (mixed[2]["lam"], mixed[2]["shares"]) == (1.0, (1.0, 0.0))
    assert MixUp(pairing=lambda targets, pool, rng: [-1]).make_plan([{}]) == [Mix()]


@pytest.mark.parametrize("stacked", [False, True])
def test_partners_come_from_a_pool_without_labels(stacked):
    images, targets = batch((2, 1), [(12, 16)] * 2)
    pool = [make_sample(0, size)[0] for size in ((12, 16), (10, 9), (4, 16))]
    out, mixed = MixUp()(torch.stack(images) if stacked else images, targets, pool=(pool, None))
    for i, target in enumerate(mixed):
        assert 0 <= target["partner"] < 3
        assert target["weights"].tolist() == [target["lam"]] * len(targets[i]["boxes"])
        assert not torch.equal(out[i], images[i])
    assert MixUp()(images[:1], targets[:1], pool=(pool, [{}] * 3))[1][0]["partner"] >= 0


def test_a_batch_of_one_and_an_empty_one_stay_as_they_are(sample):
    image, target = sample(2)
    images, targets = MixUp()([image], [target])
    assert torch.equal(images[0], image)
    assert targets[0]["partner"] == -1
    assert targets[0]["weights"].tolist() == [1, 1]
    assert MixUp()([], []) == ([], [])


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.2), (1.5, 1.5), (32.0, 32.0), (2.0, 1.0)])
def test_lams_follow_the_beta_law(alpha, beta):
    drawn = lams(MixUp(alpha if alpha == beta else (alpha, beta)))
    variance = alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1))
    assert abs(drawn.mean() - alpha / (alpha + beta)) < 5 * (variance / len(drawn)) ** 0.5
    assert abs(drawn.var() / variance - 1) < 0.15


def test_lams_follow_a_law_of_the_users():
    assert set(lams(MixUp(lam=0.625)).tolist()) == {0.625}
    uniform = lams(MixUp(lam=(0.25, 0.75)))
    assert 0.25 <= uniform.min() < 0.26
    assert 0.74 < uniform.max() <= 0.75
    assert abs(uniform.mean() - 0.5) < 0.02
    assert abs(uniform.var() - 1 / 48) < 0.003
    assert set(lams(MixUp(lam=lambda rng: rng.choice([0.25, 0.5]))).tolist()) == {0.25, 0.5}
    with pytest.raises(ValueError, match=r"lam must draw shares in \[0, 1\], but drew 1.5"):
        plan(MixUp(lam=lambda rng: 1.5))


def test_both_shares_of_a_drawn_lam_are_exact_in_float32():
    for lam in lams(MixUp(lam=lambda rng: rng.random())).tolist():
        assert float(torch.tensor(lam)) + float(torch.tensor(1 - lam)) == 1


def test_huszars_form_keeps_the_labels_of_first_alone():
    drawn = lams(MixUp(1.5, box_weights="first"))
    assert abs(drawn.mean() - 2.5 / 4) < 0.02  # Beta(2.5, 1.5)
    assert abs(lams(MixUp((1.5, 1.5), box_weights="first")).mean() - 0.5) < 0.02  # a pair is taken as it is
    images, targets = batch((2, 1), SIZES[:2])
    for options, expected in (({}, [1, 1, 0]), ({"min_weight": 0.01}, [1, 1])):
        mixed = MixUp(box_weights="first", **options)(images, targets)[1]
        assert mixed[0]["weights"].tolist() == expected
    labels = MixUp(box_weights="first", num_classes=3)(torch.rand(2, 4), torch.tensor([0, 2]))[1]
    assert labels.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_huszars_form_has_the_same_expected_weight():
    # E[lam * loss] under Beta(a, a), twice for both orders of a pair, is E[loss] under Beta(a + 1, a).
    loss = lambda lam: (lam - 0.3) ** 2  # noqa: E731
    both, first = lams(MixUp(1.5), 4000), lams(MixUp(1.5, box_weights="first"), 4000)
    assert abs(2 * (both * loss(both)).mean() - loss(first).mean()) < 0.005


def test_weights_can_be_left_as_they_are():
    images, targets = batch((2, 1), SIZES[:2])
    targets[0]["weights"] = torch.tensor([0.5, 1.0])
    assert MixUp(box_weights="ones")(images, targets)[1][0]["weights"].tolist() == [0.5, 1.0, 1.0]


def test_light_boxes_are_dropped_on_purpose():
    images, targets = batch((2, 1), SIZES[:2])
    mixed = MixUp(lam=0.75, min_weight=0.3)(images, targets)[1]
    assert [target["weights"].tolist() for target in mixed] == [[0.75] * 2, [0.75]]
    assert len(mixed[1]["masks"]) == 1


def test_p_of_zero_mixes_nothing_and_p_between_mixes_its_share():
    images, targets = batch()
    out, out_targets = MixUp(p=0.0)(images, targets)
    assert all(torch.equal(a, b) for a, b in zip(out, images, strict=True))
    assert out_targets[0].keys() == MixUp()(images, targets)[1][0].keys()
    assert abs((lams(MixUp(p=0.25)) < 1).double().mean() - 0.25) < 0.04


def test_one_draw_a_batch_if_asked_for():
    mixup = MixUp(p=0.5, per_batch=True)
    drawn = [plan(mixup) for _ in range(400)]
    assert all(len({mix.lam for mix in mixes}) == 1 for mixes in drawn)
    assert all(mix.shares == (mix.lam, 1 - mix.lam) for mixes in drawn for mix in mixes)
    assert abs(sum(mixes[0].lam < 1 for mixes in drawn) / 400 - 0.5) < 0.1
    assert len({mixes[0].lam for mixes in drawn}) > 150


def test_the_second_image_is_scaled_and_moved_if_asked_for():
    images, targets = batch()
    out, mixed = MixUp(scale=(0.5, 1.5))(images, targets)
    assert [image.shape for image in out] == [image.shape for image in images]
    assert len({target["placement"] for target in mixed}) == 5
    assert all(0.5 <= target["placement"].scale <= 1.5 for target in mixed)
    assert_same((out, mixed), mixup_batch(images, targets, [Mix.of(target) for target in mixed]))


def test_the_seed_of_torch_decides_the_plan():
    plans = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        plans.append(plan(MixUp()))
    assert plans[0] == plans[1] != plans[2]


def test_a_seed_of_its_own_decides_with_epoch_rank_and_batch_and_nothing_else(monkeypatch):
    def stream(seed=3, epoch=0, rank=0, batches=3):
        monkeypatch.setenv("RANK", str(rank))
        mixup = MixUp(seed=seed)
        mixup.set_epoch(epoch)
        torch.manual_seed(int.from_bytes(os.urandom(4), "big"))
        return [plan(mixup) for _ in range(batches)]

    assert stream() == stream()
    first, second, third = stream()
    assert first != second != third
    assert all(
        a != b
        for other in ({"seed": 4}, {"epoch": 1}, {"rank": 1})
        for a, b in zip(stream(), stream(**other), strict=True)
    )


def test_ranks_draw_apart_with_the_same_seed_of_torch(monkeypatch):
    plans = []
    for rank in (0, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        torch.manual_seed(5)
        plans.append(plan(MixUp()))
    assert plans[0] == plans[1] != plans[2]


def test_the_rank_is_that_of_the_process_group_once_there_is_one(monkeypatch):
    mixup = MixUp(seed=3)
    alone = copy.deepcopy(mixup).make_rng().random()
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 2)
    grouped = mixup.make_rng().random()
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "2")
    assert alone != grouped == MixUp(seed=3).make_rng().random()


def test_a_worker_knows_the_rank_of_its_parent_and_draws_apart_from_its_siblings(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    mixup = MixUp(seed=3)
    monkeypatch.setenv("RANK", "2")
    mixup.set_epoch(0)
    expected = copy.deepcopy(mixup).make_rng("sample", 5).random()
    monkeypatch.delenv("RANK")
    plans = []
    for worker in (0, 1):
        monkeypatch.setattr(transforms, "get_worker_info", lambda worker=worker: types.SimpleNamespace(id=worker))
        assert mixup.make_rng("sample", 5).random() == expected
        plans.append(plan(copy.deepcopy(mixup)))
    assert plans[0] != plans[1]


def test_state_saved_in_the_middle_of_an_epoch_goes_on_there(tmp_path):
    mixup = MixUp(seed=3, start=1)
    mixup.set_epoch(2)
    for _ in range(4):
        plan(mixup)
    torch.save(mixup.state_dict(), tmp_path / "state.pt")
    expected = [plan(mixup) for _ in range(3)]
    restored = MixUp(seed=3, start=1)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.epoch == 2
    restored.set_epoch(2)  # as a loop does that starts the epoch it has loaded
    assert [plan(restored) for _ in range(3)] == expected


def test_an_epoch_starts_its_count_anew():
    mixup, other = MixUp(seed=3), MixUp(seed=3)
    plan(mixup), mixup.set_epoch(1), other.set_epoch(1)
    assert plan(mixup) == plan(other)


def test_the_schedule_starts_rises_and_stops():
    mixup = MixUp(p=0.8, start=2, ramp=4, stop=8)
    expected = [0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0, 0]
    for epoch, p in enumerate(expected):
        mixup.set_epoch(epoch)
        assert mixup.probability() == mixup.probability(epoch) == pytest.approx(p)
        assert abs((lams(mixup, 150) < 1).double().mean() - p) < 0.06
    assert MixUp(p=0.5).probability(10**6) == 0.5


def mix_in_worker(samples):
    """A collate function with a MixUp of its own, which a worker copies."""
    images, targets = zip(*samples, strict=True)
    return COLLATE_MIXUP(list(images), targets)[1]


COLLATE_MIXUP = MixUp(start=1, stop=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_schedule_reaches_a_collate_function_in_running_workers(workers):
    loader = DataLoader(
        [make_sample(1, seed=i) for i in range(8)], 4, num_workers=workers, persistent_workers=workers > 0,
        collate_fn=mix_in_worker, multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    counts = []
    for epoch in range(4):
        COLLATE_MIXUP.set_epoch(epoch)
        counts.append(sum(target["partner"] >= 0 for targets in loader for target in targets))
    COLLATE_MIXUP.set_epoch(0)
    assert counts == [0, 8, 8, 0]


def test_keys_of_the_users_own_are_joined_if_named():
    images, targets = batch((2, 1), SIZES[:2])
    targets = [target | {"angle": torch.arange(len(target["boxes"]))} for target in targets]
    assert MixUp(box_keys=["angle"])(images, targets)[1][0]["angle"].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"'angle' has one entry per box .* add it to box_keys"):
        MixUp()(images, targets)


def test_mixing_leaves_the_batch_alone():
    images, targets = batch()
    kept = copy.deepcopy((images, targets))
    out, out_targets = MixUp(p=0.5, scale=(1.0, 1.0))(images, targets)
    for value in [*out, *(value for target in out_targets for value in target.values())]:
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert_same((images, targets), kept)


def test_it_survives_pickle_and_deepcopy():
    mixup = MixUp(0.7, 0.3, fill=(1.0, 2.0, 3.0), box_keys=["angle"], seed=5, pairing="permutation")
    for other in (copy.deepcopy(mixup), pickle.loads(pickle.dumps(mixup))):
        assert str(other) == str(mixup)
        assert "angle" in other.box_keys
        assert plan(other) == plan(copy.deepcopy(mixup))
        assert other._shared.is_shared()
        other.set_epoch(4)
        assert mixup.epoch == 0


def test_it_has_no_parameters_and_mixes_in_eval_mode_too():
    mixup = MixUp().eval()
    assert not list(mixup.parameters())
    assert mixup(*batch())[1][0]["partner"] >= 0


@pytest.mark.parametrize("shape", [(6, 9), (6, 1, 40, 11), (6, 3, 8, 8), (6, 2, 4, 4, 4)])
@pytest.mark.parametrize("per_batch", [False, True])
def test_labels_of_classes_mix_with_entries_of_any_modality(shape, per_batch):
    entries, labels = torch.rand(shape), torch.randint(0, 4, (6,))
    mixup = MixUp(0.2, num_classes=4, seed=1, per_batch=per_batch)
    mixes = copy.deepcopy(mixup).make_plan(labels)
    out, soft = mixup(entries, labels)
    one_hot = torch.eye(4)[labels]
    for i, mix in enumerate(mixes):
        torch.testing.assert_close(out[i], mix.lam * entries[i] + (1 - mix.lam) * entries[mix.partner])
        torch.testing.assert_close(soft[i], mix.lam * one_hot[i] + (1 - mix.lam) * one_hot[mix.partner])
    assert_same(mixup(entries, one_hot, mixes), (out, soft))
    assert len({mix.lam for mix in mixes}) == (1 if per_batch else 6)


def test_labels_of_classes_mix_as_torchvisions_do():
    from torchvision.transforms import v2

    images, labels = torch.rand(4, 3, 5, 5), torch.tensor([0, 1, 2, 3])
    torch.manual_seed(0)
    theirs, their_labels = v2.MixUp(num_classes=4, alpha=1.0)(images, labels)
    lam = float(their_labels[0].max())
    index = int(their_labels[0].argmax())
    lam = lam if index == 0 else 1 - lam
    mixes = [Mix((i - 1) % 4, lam, (lam, 1 - lam)) for i in range(4)]
    ours, our_labels = MixUp(num_classes=4)(images, labels, mixes)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_labels, their_labels)


def test_labels_of_classes_mix_with_a_pool_and_in_place():
    entries, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    out, soft = MixUp(lam=0.75, num_classes=3)(entries, labels, pool=(torch.ones(5, 3), torch.full((5,), 2)))
    assert torch.equal(out, torch.full((2, 3), 0.25))
    assert soft.tolist() == [[0.75, 0, 0.25], [0, 0.75, 0.25]]
    batch = torch.rand(2, 3)
    assert MixUp(num_classes=2, inplace=True)(batch, labels)[0] is batch


@pytest.mark.parametrize("device", DEVICES)
def test_labels_of_classes_mix_without_waiting_for_the_device(device):
    entries, labels = torch.rand(4, 3, 8, 8, device=device), torch.tensor([0, 1, 2, 1], device=device)
    with without_waiting(device):
        out, soft = MixUp(num_classes=3)(entries, labels)
    assert out.device.type == soft.device.type == device


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha must be positive and finite, one number or two, but it is 0.0"),
        ({"alpha": float("inf")}, "alpha must be .* inf"),
        ({"alpha": (1.0, -1.0)}, r"alpha must be .* \(1.0, -1.0\)"),
        ({"alpha": (1.0, 1.0, 1.0)}, "alpha must be"),
        ({"p": 1.1}, r"p must be a probability, in \[0, 1\], but it is 1.1"),
        ({"p": float("nan")}, "p must be .* nan"),
        ({"lam": 1.1}, r"lam must be a share in \[0, 1\], or \(low, high\), or a function, but it is 1.1"),
        ({"lam": (0.6, 0.4)}, r"lam must be .* \(0.6, 0.4\)"),
        ({"box_weights": "second"}, r"box_weights must be one of \['lam', 'first', 'ones'\], but it is 'second'"),
        ({"min_weight": 2.0}, r"min_weight must be in \[0, 1\], but it is 2.0"),
        ({"pairing": "roll"}, "pairing must be a function or one of .*'rotation'.*, but it is 'roll'"),
        ({"scale": (0.0, 1.0)}, r"scale must be \(low, high\), both positive, but it is \(0.0, 1.0\)"),
        ({"scale": (2.0, 1.0)}, "scale must be"),
        ({"start": -1}, "start must be an epoch, 0 or more, but it is -1"),
        ({"start": 3, "stop": 2}, "stop must be no epoch before start, 3, but it is 2"),
        ({"ramp": -1}, "ramp must be a number of epochs, 0 or more, but it is -1"),
    ],
)
def test_senseless_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixUp(**arguments)


def test_a_batch_that_does_not_fit_together_is_named_even_if_nothing_is_mixed():
    images, targets = batch()
    with pytest.raises(ValueError, match="there are 4 images and 5 targets"):
        MixUp(p=0.0)(images[:4], targets)
    with pytest.raises(TypeError, match="targets must be dicts, or one tensor of class labels, but hold a int"):
        MixUp(p=0.0)(images, [0, 1, 2, 3, 4])
    with pytest.raises(TypeError, match="class labels go with one batch tensor, and with no scale"):
        MixUp(num_classes=3)(images, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TypeError, match="class labels go with one batch tensor, and with no scale"):
        MixUp(num_classes=3, scale=(0.5, 1.0))(torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))
    targets[3]["boxes"][0, 1] = float("nan")
    with pytest.raises(ValueError, match="box 0 of target 3 must be finite"):
        MixUp(p=0.0)(images, targets)


def test_images_of_tv_tensors_stay_so():
    assert all(isinstance(image, tv_tensors.Image) for image in MixUp()(*batch())[0])


@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("options", [{}, {"p": 0.5}, {"scale": (0.5, 1.5)}])
def test_a_mix_is_written_into_memory_of_the_callers(is_list, options):
    images, targets = batch(sizes=[(12, 16)] * 5)
    images = images if is_list else torch.stack(images)
    mixup = MixUp(fill=3, **options)
    params, out = plan(mixup, 5), torch.empty(5, 3, 12, 16, dtype=torch.uint8)
    wanted, wanted_targets = mixup(images, targets, params)
    mixed, mixed_targets = mixup(images, targets, params, out=out)
    assert mixed is out
    assert all(torch.equal(one, other) for one, other in zip(out, wanted, strict=True))
    assert_same(mixed_targets, wanted_targets)


def test_soft_labels_come_with_a_batch_in_memory_of_the_callers():
    images, out = torch.rand(4, 3, 5, 5), torch.empty(4, 3, 5, 5)
    mixup, labels = MixUp(num_classes=3), torch.arange(4) % 3
    params = plan(mixup, 4)
    wanted, soft = mixup(images, labels, params)
    mixed, mixed_soft = mixup(images, labels, params, out=out)
    assert mixed is out
    assert_same((mixed, mixed_soft), (wanted, soft))


@pytest.mark.parametrize(
    ("images", "out", "message"),
    [
        ([(4, 6), (5, 5)], (2, 3, 5, 5), r"out must have the blend's shape, \(3, 5, 6\), but has \(3, 5, 5\)"),
        ([(4, 6), (5, 5)], (3, 3, 5, 6), r"out must hold 2 images, as many as are mixed, but its shape is \(3, 3,"),
        ([(5, 6), (5, 6)], (2, 3, 5, 5), r"out must have the blend's shape, \(3, 5, 6\), but has \(3, 5, 5\)"),
    ],
)
def test_memory_that_a_list_does_not_fit_is_named(images, out, message):
    images, out = [torch.rand(3, *size) for size in images], torch.zeros(out)
    with pytest.raises(ValueError, match=message):
        MixUp()(images, [{"boxes": torch.zeros(0, 4)}] * 2, out=out)
    assert not out.any()
    with pytest.raises(TypeError, match="out must be a batch tensor, but it is a list"):
        MixUp()(images, [{"boxes": torch.zeros(0, 4)}] * 2, out=list(out))
