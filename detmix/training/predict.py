"""Predict with a trained detector, and write COCO results and pictures."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import PIL.Image
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_keypoints, draw_segmentation_masks

from detmix.datasets.coco.folder import CocoFolder
from detmix.training.files import write_json, write_whole
from detmix.visualize import draw_sample

Prediction = dict[str, Tensor]
Report = Callable[[str], object]
_COLORS = [to_hex(color) for color in colormaps["tab10"].colors]  # type: ignore[attr-defined]


def list_images(paths: Iterable[str | Path], *, leave_out: str | Path | None = None) -> list[Path]:
    """List image files, each once, sorted.

    Args:
        paths: Files, which are taken whatever their suffix, and folders, which are searched with their subfolders for
            files with the suffix of an image.
        leave_out: Folder that is not searched.

    Raises:
        FileNotFoundError: if a path does not exist, or there is no image.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("b.JPG", "a.png", "notes.txt"):
        ...         Path(folder, name).touch()
        ...     [path.name for path in list_images([folder])]
        ['a.png', 'b.JPG']
    """
    left_out = None if leave_out is None else Path(leave_out).resolve()
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"images must be files or folders, but there is no {path}.")
        inside = [file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS and file.is_file()]
        for file in inside if path.is_dir() else [path]:
            if left_out is None or path.is_file() or left_out not in file.resolve().parents:
                found.setdefault(file.resolve(), file)
    if not found:
        raise FileNotFoundError(
            f"images must be files, or folders that hold {', '.join(IMG_EXTENSIONS)}, but there are none in "
            f"{', '.join(map(str, paths))}."
        )
    return sorted(found.values())


def make_content(files: Sequence[Path], class_names: Sequence[str], report: Report) -> dict[str, Any]:
    """Make the content of a COCO json for image files, with image and category ids from 1.

    Only the headers of the images are read.

    Args:
        files: Image files.
        class_names: Names of classes 1, 2, ...
        report: Called with a message for each file that is no image. Its id is not used for another file.

    Returns:
        ``info`` with the ``images_folder`` that holds all files; ``images`` (``id``, ``file_name`` in that folder,
        ``width``, ``height``); ``categories`` (``id``, ``name``); and an empty list of ``annotations``.

    Example:
        >>> content = make_content([Path("no/such.png")], ["cat"], print)
        no/such.png cannot be read: [Errno 2] No such file or directory: 'no/such.png'
        >>> content["images"], content["categories"]
        ([], [{'id': 1, 'name': 'cat'}])
    """
    folder = Path()
    if any(file.is_absolute() or ".." in file.parts for file in files):
        folder = Path(os.path.commonpath([file.absolute().parent for file in files]))
    images = []
    for number, file in enumerate(files, 1):
        try:
            with PIL.Image.open(file) as header:
                width, height = header.size
        except Exception as error:  # Pillow's readers raise what they like on a damaged file
            report(f"{file} cannot be read: {error}")
        else:
            name = (file if folder == Path() else file.absolute().relative_to(folder)).as_posix()
            images.append({"id": number, "file_name": name, "width": width, "height": height})
    categories = [{"id": label, "name": name} for label, name in enumerate(class_names, 1)]
    info = {"images_folder": str(folder)}
    return {"info": info, "images": images, "annotations": [], "categories": categories}


def make_dataset(
    files: Sequence[Path], class_names: Sequence[str], json_file: Path, report: Report
) -> tuple[dict[str, Any], CocoFolder]:
    """Write the content of `make_content` to a json file and open it as a dataset.

    Args:
        files: Image files.
        class_names: Names of classes 1, 2, ...
        json_file: File to write, whole or not at all.
        report: Called with a message for each file that is no image.

    Returns:
        The content and the dataset.

    Raises:
        ValueError: if none of the files is an image.
    """
    content = make_content(files, class_names, report)
    if not content["images"]:
        raise ValueError(f"none of {len(files)} files can be read.")
    write_json(content, json_file)
    return content, CocoFolder(content["info"]["images_folder"], json_file.absolute(), ".", check_files=False)


def predict(
    model: nn.Module,
    dataset: CocoFolder,
    report: Report,
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[Tensor, int, Prediction]]:
    """Predict on every image of a dataset, in order, without its targets.

    A detector of torchvision pads the images of a batch to one size, which moves predictions a little. With a
    ``batch_size`` of 1, a prediction does not depend on other images.

    Args:
        model: Detector of torchvision, in eval mode and on ``device``.
        dataset: Dataset of the images; its transforms are not used.
        report: Called with a message for each image that cannot be read and is left out.
        batch_size: Images per batch.
        num_workers: Processes that read images; 0 reads them in the main process.
        device: Device of the model.

    Yields:
        The image, uint8 ``(3, H, W)``, its COCO id and its prediction, all on the CPU. Boxes are XYXY in pixels of the
        image. Detections of label 0, the background, are left out.

    Example:
        >>> import tempfile
        >>> from detmix.datasets.shapes import draw_shapes
        >>> from detmix.training.build import build_detector
        >>> options = {"min_size": 64, "max_size": 64}
        >>> model = build_detector("RetinaNet", 4, backbone="resnet18", fpn_channels=32, options=options).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dataset = CocoFolder(draw_shapes(f"{folder}/shapes", num_train=2, num_val=1))
        ...     [(image.shape[0], image_id, sorted(found)) for image, image_id, found in predict(model, dataset, print)]
        [(3, 1, ['boxes', 'labels', 'scores']), (3, 2, ['boxes', 'labels', 'scores'])]
    """
    loader: DataLoader[Any] = DataLoader(
        _Readable(dataset), batch_size, num_workers=num_workers, collate_fn=list, pin_memory=False
    )
    for samples in loader:
        for message in (sample for sample in samples if isinstance(sample, str)):
            report(message)
        read = [sample for sample in samples if not isinstance(sample, str)]
        if not read:
            continue
        with torch.inference_mode():
            predictions = model([TF.to_dtype(image.to(device), torch.float32, scale=True) for image, _ in read])
        for (image, image_id), prediction in zip(read, predictions, strict=True):
            objects = prediction["labels"] > 0  # FCOS and RetinaNet also predict the background
            yield image, image_id, {key: value[objects].cpu() for key, value in prediction.items()}


def draw_prediction(
    image: Tensor, prediction: Prediction, class_names: Sequence[str], *, min_score: float = 0.3, size: int = 640
) -> Tensor:
    """Draw boxes, masks and keypoints of a prediction into its image, coloured by class.

    Args:
        image: Image, uint8 ``(3, H, W)``.
        prediction: What a detector of torchvision returns.
        class_names: Names of classes 1, 2, ...
        min_score: Minimum score of predictions that are drawn.
        size: Longer side of the picture, in pixels.

    Returns:
        The picture, uint8 ``(3, H', W')``.

    Example:
        >>> prediction = {"boxes": torch.tensor([[2.0, 2.0, 9.0, 9.0]])} | {
        ...     "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
        >>> draw_prediction(torch.zeros(3, 10, 20, dtype=torch.uint8), prediction, ["cat"], size=100).shape
        torch.Size([3, 50, 100])
    """
    keep = prediction["scores"] >= min_score
    found = {key: value[keep].flip(0) for key, value in prediction.items()}  # the highest scores are drawn last, on top
    found["source"] = found["labels"] - 1
    colors = [_COLORS[k % len(_COLORS)] for k in range(len(class_names))]
    if keep.any() and "masks" in found:
        masks = found["masks"].flatten(1, -3).squeeze(1) > 0.5  # (N, 1, H, W) to (N, H, W)
        own = [colors[k] for k in found["source"].tolist()]
        image = draw_segmentation_masks(image, masks, alpha=0.4, colors=own)
    if keep.any() and "keypoints" in found:
        image = draw_keypoints(
            image, found["keypoints"][..., :2], colors="white", radius=max(1, max(image.shape) // 200)
        )
    return draw_sample(image, found, class_names, size=size, colors=colors)


def write_predictions(
    model: nn.Module,
    dataset: CocoFolder,
    output: str | Path,
    report: Report,
    *,
    min_score: float = 0.3,
    pictures: bool = True,
    **options: Any,
) -> list[int]:
    """Predict on every image of a dataset and write ``predictions.json`` and ``pictures/``.

    The json is a list of COCO results with all that the detector returns, for ``pycocotools.coco.COCO.loadRes``. It is
    written last, whole or not at all.

    Args:
        model: Detector of torchvision, in eval mode.
        dataset: Dataset of the images; the results have its image and category ids.
        output: Folder to write into.
        report: Called with a message for each image that cannot be read and is left out.
        min_score: Minimum score of predictions that are drawn; the json holds all predictions.
        pictures: Whether to draw pictures.
        options: Other arguments of `predict`.

    Returns:
        The ids of the images that were read.

    Example:
        >>> import tempfile
        >>> from detmix.datasets.shapes import draw_shapes
        >>> from detmix.training.build import build_detector
        >>> options = {"min_size": 64, "max_size": 64}
        >>> model = build_detector("RetinaNet", 4, backbone="resnet18", fpn_channels=32, options=options).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dataset = CocoFolder(draw_shapes(f"{folder}/shapes", num_train=2, num_val=1))
        ...     ids = write_predictions(model, dataset, folder, print)
        ...     ids, sorted(path.name for path in Path(folder, "pictures").iterdir())
        ([1, 2], ['train_00000.png', 'train_00001.png'])
    """
    output = Path(output)
    files = dict(zip(dataset.image_ids.tolist(), dataset.file_names, strict=True))
    targets = _picture_paths(files) if pictures else {}
    results: list[dict[str, Any]] = []
    ids = []
    for image, image_id, prediction in predict(model, dataset, report, **options):
        ids.append(image_id)
        results += dataset.to_coco(image_id, prediction)
        if pictures:
            path = output / "pictures" / targets[image_id]
            picture = TF.to_pil_image(draw_prediction(image, prediction, dataset.class_names, min_score=min_score))
            write_whole(path, partial(picture.save, format="PNG"))
    write_json(results, output / "predictions.json")
    return ids


class _Readable(Dataset[Any]):
    """Read the images of a dataset with their ids; return a message for an image that cannot be read."""

    def __init__(self, dataset: CocoFolder) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        try:
            image = self.dataset.read_image(index)
        except (OSError, ValueError) as error:
            return str(error)
        return image.as_subclass(Tensor), int(self.dataset.image_ids[index])


def _picture_paths(files: dict[int, str]) -> dict[int, PurePath]:
    """Return the path of each image's picture in the output folder: its own path below the folder that all share."""
    absolute = {image_id: os.path.abspath(file) for image_id, file in files.items()}
    shared = os.path.commonpath([os.path.dirname(file) for file in absolute.values()])
    paths: dict[int, PurePath] = {}
    taken = set()
    for image_id, file in absolute.items():
        path = PurePath(os.path.relpath(file, shared)).with_suffix(".png")
        if path in taken:  # cat.jpg beside cat.png
            path = path.with_name(f"{path.stem}_{image_id}.png")
        taken.add(path)
        paths[image_id] = path
    return paths
