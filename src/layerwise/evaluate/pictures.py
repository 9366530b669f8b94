"""Labelled pictures: where they are read from, and how pixel values are made of them."""

import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.reading.checkpoint import Checkpoint

Images = str | Path | Sequence[Any]
Array = np.ndarray[Any, np.dtype[Any]]
# What makes pixel values, (batch, channels, height, width), of pictures as they were read.
Preparer = Callable[[Sequence[Array]], Tensor]

_PREPROCESSOR = "preprocessor_config.json"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_CHANNELS = (1, 3)
_GIVE = "Give an .npz file with arrays x and y, a folder of class folders, or (x, y) from Python."


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures, decoded when they are asked for.

    Attributes:
        label: Where they came from, for reports.
        labels: Class of each.
        names: What their classes are called; none where only numbers were given.
        digest: SHA-256 of pictures and labels.
        read: Pictures from one to before another, each (height, width, channels).
    """

    label: str
    labels: Int[Tensor, " images"]
    names: Sequence[str]
    digest: str
    read: Callable[[int, int], Sequence[Array]]


def read_pictures(images: Images, *, channels: int | None = None) -> Pictures:
    """Find labelled pictures, and check all that can be checked without a model.

    Args:
        images: An .npz file with `x`, (N, H, W), (N, H, W, C) or (N, C, H, W), bytes or fractions,
            and `y`, (N); a folder with one folder of pictures per class; or arrays `(x, y)`.
        channels: What pictures of a folder are decoded to; None for what they hold.

    Raises:
        UserError: There are none, or they are no such pictures.
    """
    if not isinstance(images, str | Path):
        if len(images) != 2:
            raise UserError(f"{len(images)} arrays were given as images.", _GIVE)
        return _from_arrays("the arrays given", np.asarray(images[0]), np.asarray(images[1]))
    path = Path(images).expanduser()
    if path.is_dir():
        return _from_folder(path, channels)
    if not path.exists():
        raise UserError(f"there are no images {path}.", _GIVE)
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f"{path} is one array, without labels.", _GIVE)
        with file:
            if missing := [name for name in ("x", "y") if name not in file.files]:
                raise UserError(
                    f"{path} lacks the array {' and '.join(missing)}; it holds "
                    f"{', '.join(file.files)}.",
                    "Save it as numpy.savez(file, x=pictures, y=classes).",
                )
            x, y = file["x"], file["y"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz file: {error}", _GIVE) from error
    return _from_arrays(str(path), x, y)


def _from_arrays(label: str, x: Array, y: Array) -> Pictures:
    x = _channels_last(label, x)
    if y.shape != x.shape[:1]:
        raise UserError(
            f"{label}: y has the shape {y.shape}, and there are {len(x)} pictures in x.",
            "Give one class per picture.",
        )
    if y.dtype.kind not in "iu" or y.min() < 0:
        raise UserError(
            f"{label}: y holds {y.dtype} from {y.min()}, not the numbers of classes.",
            "Number the classes from 0.",
        )
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise UserError(f"{label}: x holds NaN or infinity.", "Give pictures without them.")
    digest = hashlib.sha256(f"{x.dtype} {x.shape}".encode())
    digest.update(np.ascontiguousarray(x).data)
    digest.update(np.ascontiguousarray(y.astype(np.int64)).data)
    labels = torch.from_numpy(y.astype(np.int64))
    return Pictures(label, labels, (), digest.hexdigest(), lambda a, b: list(x[a:b]))


def _channels_last(label: str, x: Array) -> Array:
    """Pictures as (N, H, W, C), bytes or floats.

    Raises:
        UserError: They are something else.
    """
    if x.dtype.kind != "f" and x.dtype != np.uint8:
        raise UserError(f"{label}: x holds {x.dtype}.", "Give uint8, or floats.")
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or not x.size:
        raise UserError(
            f"{label}: x has the shape {x.shape}.",
            "Pictures are (N, H, W), (N, H, W, C) or (N, C, H, W).",
        )
    last, first = x.shape[3] in _CHANNELS, x.shape[1] in _CHANNELS
    if last == first:
        raise UserError(
            f"{label}: of the shape {x.shape} it is not plain which number counts the channels.",
            "Pictures have 1 or 3 channels, last (N, H, W, C) or first (N, C, H, W).",
        )
    return x if last else x.transpose(0, 2, 3, 1)


def _from_folder(folder: Path, channels: int | None) -> Pictures:
    image = need("PIL.Image", f"reading the image folder {folder}")
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if not classes:
        raise UserError(f"{folder} holds no folders.", "Put the pictures of a class in a folder.")
    files: list[Path] = []
    labels: list[int] = []
    digest = hashlib.sha256()
    for number, place in enumerate(classes):
        found = sorted(p for p in place.iterdir() if p.suffix.lower() in _SUFFIXES)
        if not found:
            raise UserError(
                f"{place} holds no pictures.", f"Pictures end in {', '.join(_SUFFIXES)}."
            )
        files += found
        labels += [number] * len(found)
    for file, number in zip(files, labels, strict=True):
        _opened(image, file, channels, decode=False)
        digest.update(f"{number} {file.name}".encode() + file.read_bytes())

    def read(start: int, stop: int) -> list[Array]:
        return [_opened(image, file, channels, decode=True) for file in files[start:stop]]

    names = [place.name for place in classes]
    return Pictures(str(folder), torch.tensor(labels), names, digest.hexdigest(), read)


def _opened(image: Any, file: Path, channels: int | None, *, decode: bool) -> Array:
    """A picture as (height, width, channels); nothing of it if only its header is wanted.

    Raises:
        UserError: The file holds no picture.
    """
    try:
        with image.open(file) as opened:
            if not decode:
                return np.zeros((0, 0, 0), np.uint8)
            grey = channels == 1 or (channels is None and opened.mode in ("1", "L"))
            pixels = np.asarray(opened.convert("L" if grey else "RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{file} is no picture: {error}", "Remove it, or copy it again.") from error
    return pixels[..., None] if grey else pixels


def in_classes(pictures: Pictures, source: Checkpoint) -> Pictures:
    """Pictures whose labels are the classes of a model, found by their names or their order.

    Raises:
        UserError: The model has other classes.
    """
    known: Mapping[str, Any] = source.config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    highest = int(pictures.labels.max())
    if not pictures.names:
        if highest >= len(known):
            raise UserError(
                f"{pictures.label} has a picture of class {highest}, and the {len(known)} classes "
                f"of {source.label} end at {len(known) - 1}.",
                "Give pictures of the classes that the model was trained on.",
            )
        return pictures
    numbers = {str(name): int(number) for number, name in known.items()}
    shared = [name for name in pictures.names if name in numbers]
    if len(shared) == len(pictures.names):
        table = torch.tensor([numbers[name] for name in pictures.names])
    elif not shared and len(pictures.names) == len(known):
        table = torch.arange(len(known))
    else:
        unknown = next((n for n in pictures.names if n not in numbers), pictures.names[0])
        raise UserError(
            f"{pictures.label} has the class {unknown}, which {source.label} does not; it has "
            f"{len(known)}: {', '.join(list(numbers)[:5])}, …",
            "Name the folders as config.json's id2label does, or have as many in the same order.",
        )
    return Pictures(
        pictures.label, table[pictures.labels], pictures.names, pictures.digest, pictures.read
    )


def checkpoint_preparer(
    source: Checkpoint, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Preparer, str]:
    """What makes the pixel values that a checkpoint takes, as transformers does; and how, in words.

    Args:
        source: An image classifier.
        mean: Mean of each channel, of values from 0 to 1, instead of the checkpoint's own.
        std: Standard deviation of each channel.

    Raises:
        UserError: Neither the checkpoint nor the caller says how.
    """
    _check_moments(mean, std)
    own = next((file for file in source.companions if file.name == _PREPROCESSOR), None)
    if own is None and mean is None:
        raise UserError(
            f"{source.label} has no {_PREPROCESSOR}, which says how its pictures are normalised.",
            "Copy it into the model's directory, or give --mean and --std.",
        )
    need("PIL.Image", "preparing images")
    transformers = need("transformers", "preparing images")
    transformers.utils.logging.set_verbosity_error()
    try:
        if own is not None:
            processor = transformers.AutoImageProcessor.from_pretrained(str(source.folder))
        else:
            side = source.config.get("image_size", 224)
            height, width = side if isinstance(side, Sequence) else (side, side)
            plain = need("transformers.models.vit.image_processing_pil_vit", "preparing images")
            processor = plain.ViTImageProcessorPil(size={"height": height, "width": width})
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise UserError(
            f"transformers cannot prepare images for {source.label}: {error}",
            f"Correct {_PREPROCESSOR}, or give --mean and --std without it.",
        ) from error
    moments = {} if mean is None else {"image_mean": list(mean), "image_std": list(std or ())}
    wanted = source.config.get("num_channels", 3)

    def prepare(pictures: Sequence[Array]) -> Tensor:
        if (given := pictures[0].shape[-1]) != wanted:
            raise UserError(
                f"the pictures have {given} channel(s), and {source.label} takes {wanted}.",
                "Convert the pictures.",
            )
        floats = pictures[0].dtype.kind == "f"
        if floats and any(one.min() < 0 or one.max() > 1 for one in pictures):
            raise UserError(
                "the pictures are floats outside of 0 to 1.",
                "Give uint8, or floats from 0 to 1: they are normalised here.",
            )
        scaled = {"do_rescale": False} if floats else {}
        made = processor(
            list(pictures),
            return_tensors="pt",
            input_data_format="channels_last",
            **moments,
            **scaled,
        )
        return made["pixel_values"]

    said = own.name if own is not None and mean is None else "the mean and std given"
    used = moments or {"image_mean": processor.image_mean, "image_std": processor.image_std}
    return prepare, f"{_moments(**used)}, from {said}; {_size(processor)}"


def _size(processor: Any) -> str:
    if not processor.do_resize:
        return "not resized"
    return "resized to " + " x ".join(str(side) for side in dict(processor.size).values() if side)


def module_preparer(
    mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Preparer, str]:
    """What makes the pixel values that a module in memory is called with; and how, in words.

    Bytes become fractions from 0 to 1, floats stay as they are; then both are normalised, if a
    mean and a deviation are given.  Nothing is resized.

    Args:
        mean: Mean of each channel.
        std: Standard deviation of each channel.

    Raises:
        UserError: One of the two is missing.
    """
    _check_moments(mean, std)

    def prepare(pictures: Sequence[Array]) -> Tensor:
        if len(shapes := {one.shape for one in pictures}) > 1:
            raise UserError(
                f"the pictures are of different shapes: {', '.join(map(str, sorted(shapes)))}.",
                "Resize them to what the module takes.",
            )
        stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        pixels = stacked.float() / (255 if stacked.dtype == torch.uint8 else 1)
        if mean is None or std is None:
            return pixels
        if {len(mean), len(std)} - {1, pixels.shape[1]}:
            raise UserError(
                f"mean and std have {len(mean)} and {len(std)} numbers, and the pictures "
                f"{pixels.shape[1]} channel(s).",
                "Give one number per channel.",
            )
        columns = [torch.tensor(list(one)).reshape(1, -1, 1, 1) for one in (mean, std)]
        return (pixels - columns[0]) / columns[1]

    if mean is None or std is None:
        return prepare, "not normalised; not resized"
    return prepare, f"{_moments(mean, std)}, as given; not resized"


def _check_moments(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    if (mean is None) != (std is None):
        raise UserError("of mean and std, one is missing.", "Give both, or none.")
    if std is not None and not all(one > 0 for one in std):
        raise UserError(f"std is {list(std)}.", "A standard deviation is greater than 0.")


def _moments(image_mean: Sequence[float], image_std: Sequence[float]) -> str:
    mean, std = (" ".join(f"{one:g}" for one in list(part)) for part in (image_mean, image_std))
    return f"mean {mean}, std {std}"
