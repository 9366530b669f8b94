"""The page docs/coverage.md: what a survey of model compression lists, and what layerwise has."""

import contextlib
import functools
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from layerwise.cli.main import main
from layerwise.core import catalogue
from layerwise.core.catalogue import Method

TAXONOMY = Path(__file__).parent / "coverage.yaml"
_HAS, _PART, _LACKS = "yes", "in part", "no"
_READS = {
    "nothing": "weights",
    "running": "what a model sees as it runs",
    "calibration": "a text",
    "labels": "labelled texts",
    "gradients": "a text, and gradients",
    "models": "several models",
    "clients": "what clients return",
}
INTRODUCTION = """# Coverage

Written by `make docs` from `scripts/coverage.yaml` and the catalogue. The taxonomy is that of
"Model Compression and Efficient Inference for Large Language Models: A Survey" (Wang et al., 2024,
arXiv 2402.09748).
"""


def coverage() -> str:
    """The page.

    Raises:
        UserError: The taxonomy names a method that is not there.
        ValueError: It names a flag that is not there.
    """
    taxonomy: Mapping[str, Sequence[Mapping[str, Any]]] = yaml.safe_load(TAXONOMY.read_text())
    lines = [INTRODUCTION]
    lines += ["| part | items | there | in part | not there |", "|---|---:|---:|---:|---:|"]
    for part, items in taxonomy.items():
        verdicts = [_verdict(item) for item in items]
        counts = (len(items), *(verdicts.count(one) for one in (_HAS, _PART, _LACKS)))
        lines.append(f"| {part} | {' | '.join(map(str, counts))} |")
    for part, items in taxonomy.items():
        lines += ["", f"## {part}", "", "| item | there | by | not there |", "|---|---|---|---|"]
        lines += [_row(item) for item in items]
    lines += ["", "## What each method asks for", ""]
    lines += ["| method | reads | learns | claims to beat |", "|---|---|---|---|"]
    for verb in catalogue.VERBS:
        lines += [_asks(method) for method in catalogue.methods(verb)]
    return "\n".join(lines) + "\n"


def _verdict(item: Mapping[str, Any]) -> str:
    if not item.keys() & {"methods", "flags", "by"}:
        return _LACKS
    return _PART if "lacks" in item else _HAS


def _row(item: Mapping[str, Any]) -> str:
    named = [catalogue.get(id) for id in item.get("methods", [])]
    ways = [f"[{method.id}](methods/{method.id}.md)" for method in named]
    ways += [_flag(flag) for flag in item.get("flags", [])]
    ways += [item["by"]] if "by" in item else []
    return f"| {item['item']} | {_verdict(item)} | {', '.join(ways)} | {item.get('lacks', '')} |"


def _flag(flag: str) -> str:
    if flag not in _flags():
        raise ValueError(f"{TAXONOMY} names {flag}, which compress does not have")
    return f"`{flag}`"


@functools.cache
def _flags() -> frozenset[str]:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        main(["compress", "--help"])
    return frozenset(re.findall(r"--[a-z][a-z-]*", told.getvalue()))


def _asks(method: Method) -> str:
    beaten = ", ".join(sorted({claim.beats for claim in method.claims}))
    learns = "codes" if method.learns is not None else ""
    return f"| {method.id} | {_READS[method.needs]} | {learns} | {beaten or '-'} |"
