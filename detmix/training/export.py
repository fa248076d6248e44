"""Export a detector of torchvision to ONNX, and check in onnxruntime that it predicts what it does in torch.

Needs the packages onnx and onnxruntime, which ``pip install detmix[export]`` brings.
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detmix.training.files import write_whole

OPSET = 18
TOLERANCES = {"boxes": 0.1, "scores": 1e-3, "masks": 1e-2, "keypoints": 1.5, "keypoints_scores": 1e-2}
"""The largest difference from torch, absolute, that `check_onnx` takes for rounding: boxes and keypoints in pixels.

A keypoint is the pixel where a heatmap is highest; of two neighbours that are as high, rounding chooses. Masks may be
a pixel apart.
"""


class Parity(NamedTuple):
    """How far onnxruntime is from torch.

    Attributes:
        images: How many were compared.
        detections: How many torch found in them.
        differences: The largest absolute difference of ``boxes`` (pixels), ``scores`` and whatever else the detector
            returns, over detections that have a counterpart: one of the same label, boxes within the tolerance.
        unmatched: Detections of either without a counterpart.
    """

    images: int
    detections: int
    differences: dict[str, float]
    unmatched: int

    @property
    def holds(self) -> bool:
        """Whether each detection has its counterpart and no difference is over its tolerance."""
        return self.unmatched == 0 and all(value <= TOLERANCES[key] for key, value in self.differences.items())


def export_onnx(model: nn.Module, class_names: Sequence[str]) -> bytes:
    """Export a detector to an ONNX model, which takes one image of any height and width.

    The input ``image`` is float32 ``(3, H, W)``, RGB in [0, 1]: resizing, normalisation and non-maximum suppression are
    in the model. Its outputs are those of torchvision for one image: ``boxes`` ``(N, 4)``, XYXY in pixels, ``labels``
    and ``scores`` ``(N,)``, and ``masks`` ``(N, 1, H, W)`` or ``keypoints`` ``(N, K, 3)`` and ``keypoints_scores``. Its
    metadata say which label is what: ``class_names`` is the json of a list that label 1 is the first of. Label 0, the
    background, can come from FCOS and RetinaNet, as in torch; it is no object.

    Args:
        model: A detector of torchvision.
        class_names: The names of classes 1, 2, ...

    Returns:
        The ONNX model, to be written into a file.

    Raises:
        ValueError: if the detector cannot be exported.

    Example:
        >>> from detmix.training.build import build_detector
        >>> options = {"min_size": 64, "max_size": 96}
        >>> model = build_detector("RetinaNet", 3, backbone="resnet18", fpn_channels=32, options=options)
        >>> content = export_onnx(model, ["cat", "dog"])
        >>> session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        >>> [output.name for output in session.get_outputs()]
        ['boxes', 'labels', 'scores']
        >>> session.get_modelmeta().custom_metadata_map["class_names"]
        '["cat", "dog"]'
    """
    if not isinstance(transform := getattr(model, "transform", None), GeneralizedRCNNTransform):
        raise ValueError(f"model must be a detector of torchvision, but it is a {type(model).__name__}.")
    one = _OneImage(copy.deepcopy(model).cpu().eval())
    size = transform.min_size[-1] if transform.fixed_size is None else transform.fixed_size[0]
    image = torch.rand(3, size, size * 5 // 4, generator=torch.Generator().manual_seed(0))
    names = one.names(image)
    axes = {name: {0: "detections"} for name in names} | {"image": {1: "height", 2: "width"}}
    if "masks" in names:
        axes["masks"] |= {2: "height", 3: "width"}
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
            file = Path(folder, "model.onnx")
            # Of the exporter's age, and of all values that become constants; `check_onnx` is what tells.
            warnings.simplefilter("ignore")
            # The newer exporter, dynamo=True, takes no detector: how many boxes there are depends on the image.
            torch.onnx.export(
                one,
                (image,),
                file,
                dynamo=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=names,
                dynamic_axes=axes,
            )
            exported = onnx.load(file)
    except (RuntimeError, TypeError, ValueError) as error:  # OnnxExporterError is a RuntimeError
        raise ValueError(f"{type(model).__name__} cannot be exported by torch {torch.__version__}: {error}") from error
    onnx.helper.set_model_props(
        exported, {"class_names": json.dumps(list(class_names)), "detector": type(model).__name__}
    )
    onnx.checker.check_model(exported, full_check=True)
    content: bytes = exported.SerializeToString()
    return content


def check_onnx(content: bytes, model: nn.Module, images: Iterable[Tensor]) -> Parity:
    """Compare what an ONNX model finds in images, in onnxruntime on the CPU, to what the detector finds in torch.

    Detections are compared in pairs of one label, whatever their order, since equal scores have none. One without a
    counterpart is let pass only where its score is a tolerance from where both stop. A detector that has hardly been
    trained can fail: it scores many boxes alike, and which of those are kept is a matter of their order.

    Args:
        content: What `export_onnx` returned.
        model: The detector it was given, in eval mode on the CPU.
        images: Images float32 ``(3, H_i, W_i)`` in [0, 1]; in some of them the detector should find something.

    Example:
        >>> from detmix.training.build import build_detector
        >>> _ = torch.manual_seed(0)  # of untrained detectors, one in many has scores that are too much alike
        >>> options = {"min_size": 64, "max_size": 96}
        >>> model = build_detector("FasterRCNN", 3, backbone="resnet18", fpn_channels=32, options=options).eval()
        >>> images = [torch.rand(3, 40, 50), torch.rand(3, 70, 60)]
        >>> parity = check_onnx(export_onnx(model, ["cat", "dog"]), model, images)
        >>> parity.images, parity.holds
        (2, True)
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of shapes that it found for itself
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    stop: Any = getattr(model, "roi_heads", model)
    count = detections = unmatched = 0
    differences: dict[str, float] = {}
    for image in images:
        with torch.inference_mode():
            expected: dict[str, Tensor] = model([image])[0]
        got = dict(zip(names, map(torch.as_tensor, session.run(None, {"image": image.numpy()})), strict=True))
        pairs, alone = _pair(expected, got)
        full = len(expected["scores"]) >= stop.detections_per_img
        lowest = float(expected["scores"].min()) if full else float(stop.score_thresh)
        unmatched += sum(float(score) > lowest + TOLERANCES["scores"] for score in alone)
        for key in expected.keys() - {"labels"}:
            first, second = expected[key][pairs[0]], got[key][pairs[1]]
            if first.shape != second.shape:
                raise ValueError(f"{key} are {tuple(second.shape)} in onnxruntime, but {tuple(first.shape)} in torch.")
            gap = _mask_gap(first, second) if key == "masks" else (first - second).abs()
            differences[key] = max(differences.get(key, 0.0), gap.max().item() if gap.numel() else 0.0)
        count, detections = count + 1, detections + len(expected["boxes"])
    return Parity(count, detections, differences, unmatched)


def write_onnx(content: bytes, path: str | Path) -> None:
    """Write an ONNX model into a file, whole or not at all; its folder is made."""
    write_whole(Path(path), lambda file: file.write(content))


def _pair(expected: dict[str, Tensor], got: dict[str, Tensor]) -> tuple[tuple[list[int], list[int]], list[Tensor]]:
    """Indices of detections that are each other's, and the scores of those that are nobody's."""
    apart = (expected["boxes"][:, None] - got["boxes"]).abs().amax(2)  # (N, M)
    apart[expected["labels"][:, None] != got["labels"]] = torch.inf
    apart[apart > TOLERANCES["boxes"]] = torch.inf
    # Two that share box and label are told apart by their scores.
    cost = apart + (expected["scores"][:, None] - got["scores"]).abs()
    first, second = [], []
    for i in range(len(cost)):
        if cost.shape[1] and cost[i].min() < torch.inf:
            j = int(cost[i].argmin())
            cost[:, j] = torch.inf
            first.append(i)
            second.append(j)
    alone = [expected["scores"][i] for i in sorted(set(range(len(cost))) - set(first))]
    alone += [got["scores"][j] for j in sorted(set(range(cost.shape[1])) - set(second))]
    return (first, second), alone


def _mask_gap(first: Tensor, second: Tensor) -> Tensor:
    """How far each pixel is from the range of its neighbourhood in the other mask.

    torchvision pastes masks into whole pixels, so a box that rounding moves across one takes its mask along.
    """
    if not first.numel():
        return first
    highest, lowest = F.max_pool2d(second, 3, 1, 1), -F.max_pool2d(-second, 3, 1, 1)
    return torch.maximum(first - highest, lowest - first).clamp(min=0)


class _OneImage(nn.Module):
    """A detector that takes one image and returns its tensors, the three that all have first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        resize = _Resize.__new__(_Resize)
        resize.__dict__ = model.transform.__dict__
        model.transform = resize

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        prediction = self.model([image])[0]
        return tuple(prediction[name] for name in _in_order(prediction))

    def names(self, image: Tensor) -> list[str]:
        with torch.no_grad():
            return _in_order(self.model([image])[0])


def _in_order(names: Iterable[str]) -> list[str]:
    first = ["boxes", "labels", "scores"]
    return first + [name for name in names if name not in first]


class _Resize(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's, which rounds the new size in float64; what it traces for ONNX does so in float32, a pixel off."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        if self.fixed_size is not None:
            return super().resize(image, target)  # type: ignore[no-any-return]
        size = torch._shape_as_tensor(image)[-2:].double()
        # In tensors of one dimension, since the exporter computes with those of none in float32.
        limits = torch.tensor([self.min_size[-1], self.max_size], dtype=torch.float64)
        scale = (limits / torch.stack([size.min(), size.max()])).amin(0, keepdim=True)
        new: Any = (size * scale).floor().long().unbind()  # tensors, for the trace to keep
        return F.interpolate(image[None], size=new, mode="bilinear", align_corners=False)[0], target
