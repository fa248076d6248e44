"""Export a detector of torchvision to ONNX, and compare its predictions in onnxruntime and in torch.

The packages onnx and onnxruntime are needed; ``pip install detmix[export]`` installs them.
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
"""Largest absolute differences from torch that `check_onnx` takes for rounding; boxes and keypoints in pixels.

A keypoint is the highest pixel of a heatmap, and rounding chooses between two equal neighbours. Masks may be one pixel
apart.
"""


class Parity(NamedTuple):
    """Hold the differences between onnxruntime and torch.

    Attributes:
        images: Number of images that were compared.
        detections: Number of detections of torch in them.
        differences: Largest absolute difference of ``boxes`` (pixels), of ``scores`` and of all else that the detector
            returns, between detections and their counterparts. A counterpart has the same label, and its box is within
            the tolerance.
        unmatched: Number of detections of either side without a counterpart.
    """

    images: int
    detections: int
    differences: dict[str, float]
    unmatched: int

    @property
    def holds(self) -> bool:
        """Return whether all detections have counterparts and all differences are within their tolerances."""
        return self.unmatched == 0 and all(value <= TOLERANCES[key] for key, value in self.differences.items())


def export_onnx(model: nn.Module, class_names: Sequence[str]) -> bytes:
    """Export a detector to an ONNX model that takes one image of any height and width.

    The input ``image`` is float32 ``(3, H, W)``, RGB in [0, 1]. Resizing, normalisation and non-maximum suppression are
    part of the model. The outputs are those of torchvision for one image: ``boxes`` ``(N, 4)``, XYXY in pixels,
    ``labels`` and ``scores`` ``(N,)``, and ``masks`` ``(N, 1, H, W)`` or ``keypoints`` ``(N, K, 3)`` and
    ``keypoints_scores``. The metadata hold ``class_names``, the json of a list whose first name is that of label 1.
    FCOS and RetinaNet can return label 0, the background, as in torch; skip these detections.

    Args:
        model: Detector of torchvision.
        class_names: Names of classes 1, 2, ...

    Returns:
        The bytes of an ONNX file.

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
            # The exporter is deprecated, and warns of values that become constants; `check_onnx` finds real errors.
            warnings.simplefilter("ignore")
            # The newer exporter, dynamo=True, cannot export detectors: the number of boxes depends on the image.
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
    """Compare the predictions of an ONNX model in onnxruntime, on the CPU, to those of the detector in torch.

    Detections are compared in pairs of the same label in any order, because the order of equal scores is arbitrary. A
    detection without a counterpart is accepted only if its score is within the tolerance of the lowest score that is
    kept. A detector that is hardly trained can fail: it gives many boxes equal scores, and rounding decides which of
    them are kept.

    Args:
        content: What `export_onnx` returned.
        model: The detector that was exported, in eval mode on the CPU.
        images: Images float32 ``(3, H_i, W_i)`` in [0, 1]. The detector should find something in some of them.

    Raises:
        ValueError: if an output has another shape than in torch.

    Example:
        >>> from detmix.training.build import build_detector
        >>> _ = torch.manual_seed(0)  # some untrained detectors have scores that are too similar
        >>> options = {"min_size": 64, "max_size": 96}
        >>> model = build_detector("FasterRCNN", 3, backbone="resnet18", fpn_channels=32, options=options).eval()
        >>> images = [torch.rand(3, 40, 50), torch.rand(3, 70, 60)]
        >>> parity = check_onnx(export_onnx(model, ["cat", "dog"]), model, images)
        >>> parity.images, parity.holds
        (2, True)
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # onnxruntime warns of shapes that it infers
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
    """Write an ONNX model into a file, whole or not at all. The folder is made if it is missing."""
    write_whole(Path(path), lambda file: file.write(content))


def _pair(expected: dict[str, Tensor], got: dict[str, Tensor]) -> tuple[tuple[list[int], list[int]], list[Tensor]]:
    """Return the indices of pairs of counterparts, and the scores of detections without a counterpart."""
    apart = (expected["boxes"][:, None] - got["boxes"]).abs().amax(2)  # (N, M)
    apart[expected["labels"][:, None] != got["labels"]] = torch.inf
    apart[apart > TOLERANCES["boxes"]] = torch.inf
    # Scores tell detections of the same box and label apart.
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
    """Return how far each pixel is from the range of its neighbourhood in the other mask.

    torchvision pastes masks into whole pixels, so a box that rounding moves across a pixel moves its mask.
    """
    if not first.numel():
        return first
    highest, lowest = F.max_pool2d(second, 3, 1, 1), -F.max_pool2d(-second, 3, 1, 1)
    return torch.maximum(first - highest, lowest - first).clamp(min=0)


class _OneImage(nn.Module):
    """Take one image and return a tuple of tensors: boxes, labels, scores, then the others."""

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
    """Compute the new size in float64, as torchvision does; its own ONNX code uses float32 and can be a pixel off."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        if self.fixed_size is not None:
            return super().resize(image, target)  # type: ignore[no-any-return]
        size = torch._shape_as_tensor(image)[-2:].double()
        # Tensors of one dimension, because the exporter computes with tensors of no dimension in float32.
        limits = torch.tensor([self.min_size[-1], self.max_size], dtype=torch.float64)
        scale = (limits / torch.stack([size.min(), size.max()])).amin(0, keepdim=True)
        new: Any = (size * scale).floor().long().unbind()  # tensors, for the trace to keep
        return F.interpolate(image[None], size=new, mode="bilinear", align_corners=False)[0], target
