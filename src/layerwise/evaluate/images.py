"""Image classifiers: accuracy, and agreement with the model they were made from."""

from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import Checkpoint
from layerwise.core.reading.families import IMAGE_CLASSIFIERS
from layerwise.core.telling.outcome import ImageScores
from layerwise.evaluate.pictures import Pictures, Preparer

_BATCH = 64


def check_classifier(source: Checkpoint) -> None:
    """Refuse a checkpoint that answers no picture with classes.

    Raises:
        UserError: It is of another kind.
    """
    architecture = (source.config.get("architectures") or [""])[0]
    if not architecture.endswith(IMAGE_CLASSIFIERS):
        raise UserError(
            f"{source.label} is a {architecture or 'model of unknown class'}, which does not sort "
            "images into classes.",
            "Give an image classifier's directory, or its module from Python.",
        )


def compare_images(
    pictures: Pictures, prepare: Preparer, normalised: str, model: Any, base: Any
) -> ImageScores:
    """Accuracy over pictures, and divergence from the original.

    Args:
        pictures: What is read.
        prepare: What makes pixel values of them.
        normalised: How, in words.
        model: The classifier to judge: a module that gives logits, or an outcome with `logits`.
        base: The original; None if there is none.

    Raises:
        UserError: A model gives something else, or has fewer classes.
    """
    total = len(pictures.labels)
    measured: list[Tensor] = []
    classes = 0
    for start in range(0, total, _BATCH):
        labels = pictures.labels[start : start + _BATCH]
        pixels = prepare(pictures.read(start, start + len(labels)))
        logits = _classes(model, pixels, int(pictures.labels.max()))
        classes = logits.shape[1]
        columns = [_hit(logits, labels, 1), _hit(logits, labels, min(5, classes))]
        if base is not None:
            before = _classes(base, pixels, int(pictures.labels.max()))
            if before.shape != logits.shape:
                raise UserError(
                    f"the model has {classes} classes, the one it is compared with "
                    f"{before.shape[1]}.",
                    "Give the model that it was made from.",
                )
            columns += _beside(logits, before, labels)
        measured.append(torch.stack(columns, dim=1))
    values = torch.cat(measured)
    return _image_scores(pictures, normalised, classes, values)


def _hit(logits: Tensor, labels: Tensor, most: int) -> Float64[Tensor, " images"]:
    return (logits.topk(most).indices == labels[:, None]).any(dim=1).double()


def _beside(logits: Tensor, before: Tensor, labels: Tensor) -> list[Tensor]:
    """Of each picture: the original's hits, agreement, KL from the original, hits gained."""
    scored, reference = (functional.log_softmax(one, dim=1) for one in (logits, before))
    divergence = functional.kl_div(scored, reference, reduction="none", log_target=True)
    most = min(5, logits.shape[1])
    was = _hit(before, labels, 1)
    agreed = (logits.argmax(dim=1) == before.argmax(dim=1)).double()
    gained = _hit(logits, labels, 1) - was
    return [was, _hit(before, labels, most), agreed, divergence.double().sum(dim=1), gained]


def _classes(model: Any, pixels: Tensor, highest: int) -> Float[Tensor, "images classes"]:
    try:
        with torch.no_grad():
            found = model(pixels)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"the model takes no pictures of the shape {tuple(pixels.shape)}: {error}",
            "Give pictures of the size and channels that it was trained on.",
        ) from error
    logits: Any = getattr(found, "logits", found)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(pixels):
        raise UserError(
            f"the model answers {len(pixels)} pictures with "
            f"{tuple(getattr(logits, 'shape', ())) or type(logits).__name__}.",
            "Give a classifier: it answers with (images, classes).",
        )
    if logits.shape[1] <= highest:
        raise UserError(
            f"there is a picture of class {highest}, and the model has {logits.shape[1]} classes.",
            "Give pictures of the classes that the model was trained on.",
        )
    if not torch.isfinite(logits).all():
        raise UserError(
            "the model answers NaN or infinity.", "Its weights are damaged: use another one."
        )
    return logits.float()


def _image_scores(
    pictures: Pictures, normalised: str, classes: int, values: Float64[Tensor, "images columns"]
) -> ImageScores:
    means: list[float] = values.mean(dim=0).tolist()
    single = len(values) == 1
    spread = values.std(dim=0) / len(values) ** 0.5 if not single else values[0]
    names = ("accuracy", "top5", "accuracy_before", "top5_before", "agreement", "kl", "gained")
    found: dict[str, float | None] = dict(zip(names, means, strict=False))
    errors = dict.fromkeys(names) if single else dict(zip(names, spread.tolist(), strict=False))
    if classes <= 5:
        found |= {"top5": None, "top5_before": None}
        errors |= {"top5": None, "top5_before": None}
    return ImageScores(
        images=len(values),
        classes=classes,
        source=pictures.label,
        digest=pictures.digest,
        normalised=normalised,
        accuracy=means[0],
        **{name: found.get(name) for name in names[1:]},
        **{f"{name}_error": errors.get(name) for name in names},
    )
