import copy
import pickle

import pytest
import torch
from torchvision import tv_tensors

from detmix import MixUp
from detmix.functional import mixup
from detmix.transforms import MixUpParams
from tests.conftest import assert_same

SIZES = [(12, 16), (9, 20), (12, 16), (20, 8), (5, 5)]


def batch(sample, counts=(2, 0, 3, 1, 0), sizes=SIZES):
    return [
        list(part)
        for part in zip(*(sample(n, s, i) for i, (n, s) in enumerate(zip(counts, sizes, strict=False))), strict=True)
    ]


def test_every_sample_is_mixed_with_the_partner_it_names(sample):
    images, targets = batch(sample)
    mixed_images, mixed_targets = MixUp()(images, targets)
    assert [target["partner"] for target in mixed_targets] != [-1] * 5
    for i, (image, target) in enumerate(zip(mixed_images, mixed_targets, strict=True)):
        j, lam = target["partner"], target["lam"]
        expected = mixup((images[i], targets[i]), (images[j], targets[j]), lam)
        assert_same((image, target), (expected[0], expected[1] | {"partner": j}))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_batch_tensor_mixes_as_a_list_does(sample, dtype):
    images, targets = batch(sample, sizes=[(12, 16)] * 5)
    stacked = torch.stack([image.as_subclass(torch.Tensor) for image in images]).to(dtype)
    params = MixUp().make_params(5)
    out, out_targets = MixUp()(stacked, targets, params)
    listed, listed_targets = MixUp()(list(stacked), targets, params)
    assert out.shape == (5, 3, 12, 16)
    assert out.dtype == dtype
    assert torch.equal(out, torch.stack(listed))
    assert_same(out_targets, listed_targets)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_no_sample_meets_itself_and_each_is_partner_once(size):
    for _ in range(50):
        params = MixUp().make_params(size)
        assert all(i != j for i, j in enumerate(params.partners))
        assert sorted(params.partners) == list(range(size))
        assert len(set(params.lams)) == size


def test_partners_change_from_batch_to_batch():
    mixup = MixUp()
    assert {mixup.make_params(4).partners[0] for _ in range(60)} == {1, 2, 3}


def test_a_batch_of_one_and_an_empty_one_stay_as_they_are(sample):
    image, target = sample(2)
    images, targets = MixUp()([image], [target])
    assert torch.equal(images[0], image)
    assert targets[0]["partner"] == -1
    assert targets[0]["weights"].tolist() == [1, 1]
    assert MixUp()([], []) == ([], [])


def test_p_of_zero_mixes_nothing_and_p_between_mixes_its_share(sample):
    images, targets = batch(sample)
    out, out_targets = MixUp(p=0.0)(images, targets)
    assert all(torch.equal(a, b) for a, b in zip(out, images, strict=True))
    assert out_targets[0].keys() == MixUp()(images, targets)[1][0].keys()
    lams = [lam for _ in range(300) for lam in MixUp(p=0.25).make_params(8).lams]
    assert abs(sum(lam < 1 for lam in lams) / len(lams) - 0.25) < 0.04


@pytest.mark.parametrize("alpha", [0.2, 1.5, 32.0])
def test_lams_follow_the_beta_law(alpha):
    lams = torch.tensor([lam for _ in range(500) for lam in MixUp(alpha).make_params(8).lams], dtype=torch.float64)
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lams.mean() - 0.5) < 5 * (variance / len(lams)) ** 0.5
    assert abs(lams.var() / variance - 1) < 0.15


def test_the_seed_of_torch_or_of_a_generator_decides_the_plan():
    plans = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        plans.append(MixUp().make_params(6))
    assert plans[0] == plans[1] != plans[2]
    plans = [MixUp(generator=torch.Generator().manual_seed(seed)).make_params(6) for seed in (7, 7, 8)]
    assert plans[0] == plans[1] != plans[2]


def test_a_recorded_plan_replays_bit_for_bit(sample):
    images, targets = batch(sample)
    first = MixUp()(images, targets)
    params = MixUpParams([t["partner"] for t in first[1]], [t["lam"] for t in first[1]])
    assert_same(MixUp()(images, targets, params), first)


def test_mixing_leaves_the_batch_alone(sample):
    images, targets = batch(sample)
    kept = copy.deepcopy((images, targets))
    out, out_targets = MixUp(p=0.5)(images, targets, MixUpParams([1, 2, -1, 4, 0], [0.5, 0.5, 1.0, 0.5, 0.5]))
    for value in [*out, *(value for target in out_targets for value in target.values())]:
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert_same((images, targets), kept)


def test_weights_of_each_source_are_its_share(sample):
    _, targets = MixUp()(*batch(sample))
    for target in targets:
        for source, share in ((0, target["lam"]), (1, 1 - target["lam"])):
            weights = target["weights"][target["source"] == source]
            torch.testing.assert_close(weights, torch.full_like(weights, share))


def test_what_no_image_covers_is_filled(sample):
    images, targets = batch(sample, counts=(1, 1), sizes=[(8, 4), (4, 8)])
    mixed, _ = MixUp(fill=(10, 20, 30))(images, targets)
    assert mixed[0][:, 5, 5].tolist() == mixed[1][:, 7, 7].tolist() == [10, 20, 30]


def test_further_box_keys_are_joined(sample):
    images, targets = batch(sample)
    for target in targets:
        target["angle"] = torch.rand(len(target["boxes"]))
    with pytest.raises(ValueError, match="'angle'"):
        MixUp()(images, targets)
    _, mixed = MixUp(box_keys=["angle"])(images, targets)
    assert all(len(target["angle"]) == len(target["boxes"]) for target in mixed)


def test_it_survives_pickle_and_deepcopy(sample):
    images, targets = batch(sample)
    original = MixUp(0.7, fill=(1.0, 2.0, 3.0))
    params = original.make_params(5)
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert_same(copied(images, targets, params), original(images, targets, params))
    assert "alpha=0.7" in repr(original)
    assert not list(original.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0}, "alpha of Beta.* positive.* it is 0"),
        ({"alpha": float("nan")}, "it is nan"),
        ({"p": 1.1}, r"p is a probability and must lie in \[0, 1\], but it is 1.1"),
    ],
)
def test_senseless_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixUp(**arguments)


def test_a_batch_that_does_not_fit_together_is_named_even_if_nothing_is_mixed(sample):
    images, targets = batch(sample)
    with pytest.raises(ValueError, match="there are 4 images and 5 targets"):
        MixUp(p=0.0)(images[:4], targets)
    targets[3]["boxes"][0, 1] = float("nan")
    with pytest.raises(ValueError, match="box 0 of target 3 must be finite"):
        MixUp(p=0.0)(images, targets)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stacked", [False, True])
def test_on_cuda_it_gives_the_same_without_waiting_for_the_device(sample, stacked):
    images, targets = batch(sample, sizes=[(12, 16)] * 5 if stacked else SIZES)
    images = torch.stack(images) if stacked else images
    move = lambda x: x.cuda() if isinstance(x, torch.Tensor) else x  # noqa: E731
    params = MixUp().make_params(5)
    expected_images, expected = MixUp(fill=3)(images, targets, params)
    images = images.cuda() if stacked else [image.cuda() for image in images]
    targets = [{key: move(value) for key, value in target.items()} for target in targets]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, out_targets = MixUp(fill=3)(images, targets, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(out, expected_images, strict=True):
        assert (a.cpu().int() - b.int()).abs().max() <= 1  # a tie may round either way
    assert_same(
        [{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in t.items()} for t in out_targets], expected
    )


def test_images_of_tv_tensors_stay_so(sample):
    assert all(isinstance(image, tv_tensors.Image) for image in MixUp()(*batch(sample))[0])
