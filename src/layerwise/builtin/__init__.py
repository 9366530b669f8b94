"""The built-in model `builtin:tiny` and the text that goes with it.

Both were made by `scripts/train_builtin.py`; `README.md` beside this file says how.
"""

from pathlib import Path
from typing import Literal

NAME = "builtin:tiny"

_HERE = Path(__file__).resolve().parent


def model_path() -> Path:
    """Return the folder of the built-in model.

    It holds a Llama with grouped-query attention and its tokenizer, as `from_pretrained` reads
    them. Its size, its training and its held-out perplexity, before and after plain quantization
    and plain pruning, are in `TRAINING.json` in that folder; the log is `training_log.jsonl`.

    Returns:
        The folder `tiny` of the installed package.
    """
    return _HERE / "tiny"


def text_path(name: Literal["calibration", "heldout"]) -> Path:
    """Return a text file that the built-in model was not trained on.

    The two texts share no document and no paragraph with each other or with the training text.
    Their sizes and digests are in `TRAINING.json` in the model's folder.

    Args:
        name: `calibration` to gather statistics from, `heldout` to measure on.

    Returns:
        A UTF-8 file of documents separated by a blank line.

    Raises:
        ValueError: If there is no text of that name.
    """
    if name not in ("calibration", "heldout"):
        raise ValueError(f"no built-in text {name!r}; there are 'calibration' and 'heldout'")
    return _HERE / "text" / f"{name}.txt"
