import functools
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torchvision.models import detection
from torchvision.transforms.v2 import functional as TF
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

import detmix
from detmix import weight_losses
from tests.conftest import assert_same, make_sample

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.name, block)
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
]


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the examples take for granted, and detectors that resize to little so that they are quick."""
    small = functools.partial(detection.fcos_resnet50_fpn, min_size=64, max_size=64)
    monkeypatch.setattr(detection, "fcos_resnet50_fpn", small)
    monkeypatch.chdir(tmp_path)
    model = weight_losses(small(weights=None, weights_backbone=None, num_classes=4))
    torch.save({"state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}}, "best.ckpt")
    samples = [make_sample(i % 3, (40 + i, 50), seed=i) for i in range(4)]
    images = [image.float() / 255 for image, _ in samples]
    targets = [target for _, target in samples]
    resized = [make_sample(i, (40, 50), seed=i) for i in range(4)]
    given = {"images": images, "targets": targets, "dataset": samples, "resized": resized}
    return given | {"detr": tiny_detr(), "detmix": detmix}


def tiny_detr():
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    few = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 1)
    widths = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16)
    config = DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, num_queries=10, num_labels=4, **few, **widths
    )
    return DetrForObjectDetection(config)


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_the_examples_run(page, block, names):
    exec(compile(block, f"example of {page}", "exec"), names)
    if "losses" in names:
        assert all(torch.isfinite(loss) for loss in names["losses"].values())
    if "loss" in names:
        assert torch.isfinite(names["loss"])
        assert_mixed_before_and_after_normalisation_alike(names)
    if "again" in names:
        assert_same(names["again"], names["mixed_images"])
    if "batches" in names:
        for batch, mixed in names["batches"]:
            assert batch.shape == (2, 3, 40, 50)
            assert all("weights" in target for target in mixed)
    if "crop" in names:
        assert len(names["target"]["weights"]) == len(names["target"]["boxes"])


def assert_mixed_before_and_after_normalisation_alike(names):
    """With black as its fill, a mix of normalised images is the normalised mix of the images."""
    sizes = [image[..., : 30 + 5 * i] for i, image in enumerate(names["images"])]
    bare = [{}] * len(sizes)
    plan = names["mixup"].make_plan(bare)
    after, _ = names["mixup"]([TF.normalize(image, names["mean"], names["std"]) for image in sizes], bare, plan)
    before, _ = detmix.MixUp()(sizes, bare, plan)
    for one, other in zip(after, before, strict=True):
        torch.testing.assert_close(one, TF.normalize(other, names["mean"], names["std"]))


def test_ci_takes_its_test_command_from_here():
    script = (ROOT / ".ci/run").read_text()
    extract = re.search(r"^test_command=\$\((.*)\)$", script, flags=re.MULTILINE).group(1)
    command = subprocess.run(
        ["bash", "-c", extract], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert command in README
    assert len(command.splitlines()) == 1
    assert "pip install" in command
    assert "pytest" in command
    assert command not in script


def test_every_config_it_names_is_there():
    named = set(re.findall(r"\b[\w]+\.yaml", README)) - {"config.yaml"}
    assert named == {path.name for path in (ROOT / "configs").glob("*.yaml")}


def test_the_ratios_that_are_quoted_are_those_of_a_run_that_is_kept():
    speed = (ROOT / "docs/speed.md").read_text()
    (name,) = re.findall(r"`(benchmarks/[\w.-]+\.json)`", speed)
    kept = {
        (
            case["section"],
            case["case"],
            comparison["run"],
            comparison["beside"],
        ): f"{comparison['ratio_of_medians']:.2f}"
        for case in json.loads((ROOT / name).read_text())["cases"]
        for comparison in case["comparisons"]
    }
    quoted = re.findall(
        r"^\| (\w+) \| ([\w ]+) \| ([\w =.+-]+) \| ([\w .]+) \| ([\d.]+) \|$", speed, flags=re.MULTILINE
    )
    assert len(quoted) > 10
    for *what, ratio in quoted:
        assert kept[tuple(what)] == ratio, what


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], target


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 150
