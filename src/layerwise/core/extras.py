"""Packages that only some work needs."""

import importlib
from typing import Any

from layerwise.core.errors import UserError

# What pip calls the extra that brings a package.
_EXTRAS = {
    "transformers": "transformers",
    "tokenizers": "transformers",
    "huggingface_hub": "transformers",
    "compressed_tensors": "compressed-tensors",
    "gguf": "gguf",
    "accelerate": "gguf",
    "datasets": "datasets",
    "ray": "ray",
    "lm_eval": "tasks",
    "PIL": "images",
    "gptqmodel": "gptq",
    "optimum": "gptq",
    "peft": "peft",
    "flwr": "flower",
    "sklearn": "studies",
}


def need(package: str, purpose: str) -> Any:
    """Import an optional package.

    Args:
        package: Its import name.
        purpose: What needs it, as the subject of a sentence.

    Raises:
        UserError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs the package {package.partition('.')[0]}: {error}.",
            f"pip install 'layerwise[{_EXTRAS[package.partition('.')[0]]}]'.",
        ) from error
