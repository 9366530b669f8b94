"""The benches of claims: what a method loses on a model that is at hand.

A bench is named `<model>/<verb>`.  Its loss is the excess cross-entropy, in nats per token, of the
compressed model over the original on held-out text: lower is better, 0 is lossless.  For the verb
`sparsify` nothing is compressed: the model leaves work out while it runs.  Models in STUDIES have a
loss of their own, which their functions say.
"""

import functools
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layerwise as lw
from layerwise.core import catalogue
from layerwise.testing.clients import clients_loss
from layerwise.testing.digits import digits_loss
from layerwise.testing.experts import experts_loss, searched_loss
from layerwise.testing.outliers import with_outliers
from layerwise.testing.pictures import FILE as PICTURES_FILE
from layerwise.testing.pictures import pictures_loss
from layerwise.testing.relations import (
    barrier_loss,
    corrupted_loss,
    shifted_loss,
    soup_loss,
    twins_loss,
)

ASSETS = "LAYERWISE_ASSETS"
_TUNED = ("", "-ft-shakespeare", "-ft-wikitext")


@dataclass(frozen=True, slots=True)
class _Model:
    """A trained model and its texts, by path below the assets; "" is built in.

    Above 1, `outliers` is how much larger a few of the inputs of its layers are made.  The part of
    the held-out text before `unseen_from`, a fraction, was in the model's training.
    """

    path: str
    calibration: str
    heldout: str
    length: int = 256
    windows: int = 64
    outliers: float = 1.0
    unseen_from: float = 0.0


_MODELS = {
    "builtin-tiny": _Model("", "builtin", "builtin"),
    "stories-char-940k": _Model(
        "models/stories-char-940k",
        "text/tinystories/train_stories.json",
        "text/tinystories/heldout_stories.json",
    ),
    "bytes-wikitext": _Model(
        "models/bytes-wikitext", "text/wikitext2/valid.txt", "text/wikitext2/test.txt", 64, 128
    ),
    "bytes-wikitext-outliers": _Model(
        "models/bytes-wikitext",
        "text/wikitext2/valid.txt",
        "text/wikitext2/test.txt",
        64,
        128,
        30.0,
    ),
    "reference-6m": _Model(
        "models/reference-6m",
        "text/wikitext2/valid.txt",
        "text/wikitext2/test.txt",
        unseen_from=0.5,
    ),
}

# What a bench does beside the options of the claim, and which argument names the method.
_BENCHES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "quantize": ("method", {}),
    "prune": ("pruner", {}),
    "narrow": ("narrow", {}),
    "recover": ("recover", {"pruner": "magnitude"}),
    "compensate": ("compensator", {"bits": 2, "group": 64}),
    "measure": ("measure", {"allocate": "threshold", "group": 64}),
    "allocate": ("allocate", {"method": "gptq", "group": 32, "symmetric": True}),
}


@dataclass(frozen=True, slots=True)
class _Study:
    """A model with a loss of its own, of a method's name and options; `needs` is below the assets.

    Where nothing is needed the model is trained on the spot, of data that scikit-learn brings.
    """

    loss: Callable[[str, Mapping[str, Any]], float]
    needs: str = ""


def bench_loss(model: str, verb: str, method: str, options: Mapping[str, Any]) -> float:
    """What a method loses on a bench; lower is better."""
    if model in STUDIES:
        return STUDIES[model].loss(method, options)
    if verb == "sparsify":
        return running_loss(model, method, options)
    return excess_loss(model, verb, method, options)


def is_here(model: str) -> bool:
    """Whether a bench's model can be had on this machine."""
    path = STUDIES[model].needs if model in STUDIES else _MODELS[model].path
    return not path or (bool(os.environ.get(ASSETS)) and _asset(path).exists())


def running_loss(model: str, name: str, options: Mapping[str, Any]) -> float:
    """Excess cross-entropy of a model that leaves work out while it runs, in nats per token."""
    facts = _MODELS[model]
    said = dict(options)
    seen = lw.evaluate(
        str(_asset(facts.path)) if facts.path else "builtin:tiny",
        text=_heldout(facts),
        samples=facts.windows,
        length=facts.length,
        noise_floor=False,
        sparsify=name,
        density=said.pop("density"),
        skipping=said,
    )
    assert seen.text is not None
    assert seen.text.loss_added is not None
    return seen.text.loss_added


def _asset(path: str) -> Path:
    return Path(os.environ[ASSETS]) / path


def _heldout(facts: _Model) -> str | list[str]:
    if not facts.path:
        return "builtin"
    file = _asset(facts.heldout)
    if not facts.unseen_from:
        return str(file)
    content = file.read_text(encoding="utf-8")
    return [content[int(facts.unseen_from * len(content)) :]]


def tuned_loss(method: str, options: Mapping[str, Any]) -> float:
    """What a merge of two tuned models loses on both texts beyond the model tuned to each."""
    models = [_asset(f"models/stories260k{one}") for one in _TUNED]
    files = [_asset(one) for one in ("text/tinyshakespeare/input.txt", "text/wikitext2/test.txt")]
    # Their beginnings calibrate, their ends compare; the models' own training text is not known.
    contents = [file.read_text(encoding="utf-8") for file in files]
    chosen = catalogue.get(f"merge/{method}")
    with tempfile.TemporaryDirectory() as folder:
        ends = [Path(folder) / f"{n}.txt" for n in range(2)]
        for file, content in zip(ends, contents, strict=True):
            file.write_text(content[-150_000:], encoding="utf-8")
        done = lw.merge(
            models[1:],
            Path(folder) / "out",
            base=models[0] if {"base", "origin"} & set(chosen.evidence) else None,
            method=method,
            options=chosen.accepts(options),
            calibration=[[content[:200_000]] for content in contents]
            if {"grams", "fishers"} & set(chosen.evidence)
            else None,
            samples=64,
            text=ends,
            text_samples=64,
        )
    losses = {(one.model, one.text): one.loss for one in done.scores}
    pairs = [(str(model), str(text)) for model, text in zip(models[1:], ends, strict=True)]
    return sum(losses["merged", text] - losses[model, text] for model, text in pairs) / 2


def excess_loss(model: str, verb: str, name: str, options: Mapping[str, Any]) -> float:
    """Excess cross-entropy of one method on one bench, in nats per token."""
    facts = _MODELS[model]
    argument, fixed = _BENCHES[verb]
    built_in = not facts.path
    wish: dict[str, Any] = {**fixed, **options, argument: name}
    source = "builtin:tiny" if built_in else str(_asset(facts.path))
    with tempfile.TemporaryDirectory() as folder:
        if facts.outliers != 1:
            source = str(with_outliers(source, Path(folder) / "outliers", facts.outliers))
        report = lw.compress(
            source,
            Path(folder) / "out",
            calibration="builtin" if built_in else str(_asset(facts.calibration)),
            text=_heldout(facts),
            samples=facts.windows,
            text_samples=facts.windows,
            length=facts.length,
            noise_floor=False,
            cache=False,
            layer_windows=0,
            **wish,
        )
    seen = report.comparison
    assert seen is not None
    assert seen.perplexity_before is not None
    return math.log(seen.perplexity) - math.log(seen.perplexity_before)


STUDIES: Mapping[str, _Study] = {
    "digits-mlp": _Study(lambda method, options: digits_loss(method, options["density"])),
    "digits-clients": _Study(clients_loss),
    "digits-corrupted": _Study(corrupted_loss),
    "digits-shifted": _Study(shifted_loss),
    "digits-soup": _Study(functools.partial(soup_loss, "soup")),
    "digits-specialists": _Study(functools.partial(soup_loss, "specialists")),
    "digits-twins": _Study(twins_loss),
    "digits-twins-barrier": _Study(barrier_loss),
    "digits-experts": _Study(experts_loss),
    "digits-experts-searched": _Study(searched_loss),
    "digits-experts-unseen": _Study(functools.partial(experts_loss, unseen=True)),
    "mnist-vit": _Study(lambda method, said: pictures_loss(method, **said), PICTURES_FILE),
    "stories260k-tuned": _Study(tuned_loss, "models/stories260k"),
}
