"""Write the pages that are generated: methods, servers' rules, a survey's coverage, and claims.

python scripts/make_docs.py                     # all but the claims
python scripts/make_docs.py --claims            # the claims too; runs them all (minutes)
python scripts/make_docs.py --claims quantize/x # those of some methods; the others' rows stay
python scripts/make_docs.py --check             # fail if a method's page would be another
python scripts/make_docs.py --claims --check    # fail if a claim's verdict would be another
"""

import argparse
import itertools
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from coverage_page import coverage
from troubleshooting_page import troubleshooting

from layerwise.cli.screen import Bars, console
from layerwise.core import catalogue
from layerwise.core.catalogue import Codes
from layerwise.export.servers import SERVERS
from layerwise.report import claims_table, page
from layerwise.testing.claims import CLOSE, FAILS, HOLDS, NOT_REACHED, Verdict, check_claims

DOCS = Path(__file__).resolve().parent.parent / "docs"
CLAIMS = DOCS / "claims.md"


def main() -> int:
    """Write or check the generated pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--claims", nargs="*", metavar="METHOD")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no claim after so many"
    )
    chosen = parser.parse_args()
    pages = _pages()
    if chosen.check:
        if chosen.claims is None:
            return _check_pages(pages)
        return _check_claims(chosen.claims, chosen.minutes)
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in _there() - pages.keys():
        path.unlink()
    if chosen.claims is not None:
        found = _found(chosen.claims, chosen.minutes)
        missed = {one.method for one in found if one.verdict == NOT_REACHED}
        found = [one for one in found if one.method not in missed]
        CLAIMS.write_text(_claims(found, _recorded() if chosen.claims or missed else []))
    return 0


def _there() -> set[Path]:
    return set((DOCS / "methods").rglob("*.md"))


def _check_pages(pages: Mapping[Path, str]) -> int:
    stale = {path for path, text in pages.items() if not path.exists() or path.read_text() != text}
    stale |= _there() - pages.keys()
    for path in sorted(stale):
        print(f"{path} is not what `make docs` writes", file=sys.stderr)
    return int(bool(stale))


def _found(ids: Sequence[str], minutes: float) -> list[Verdict]:
    with Bars() as bars:
        return check_claims(ids, bars, processes=os.cpu_count() or 1, minutes=minutes)


def _recorded() -> list[str]:
    """The rows of claims that are written down."""
    rows = [line for line in CLAIMS.read_text().splitlines() if line.startswith("| ")]
    return rows[1:]  # the first names the columns


def _check_claims(ids: Sequence[str], minutes: float) -> int:
    """Figures move a little from machine to machine; verdicts must not turn round.

    What is too close to tell here may be told elsewhere, and the other way round.
    """
    found = _found(ids, minutes)
    console().print(claims_table(found))
    recorded = _recorded()
    wrong = [
        one
        for one in found
        if one.loss is not None
        and not any(
            line.startswith(f"| {' | '.join(_name(one))} |") and _agree(one.verdict, line)
            for line in recorded
        )
    ]
    for one in wrong:
        said = f"{' '.join(_name(one))}: {one.verdict}"
        print(f"{said}, which {CLAIMS} does not say", file=sys.stderr)
    return int(bool(wrong))


def _agree(verdict: str, line: str) -> bool:
    said = {HOLDS, FAILS} if verdict == CLOSE else {verdict}
    return any(f"| {one} |" in line for one in (*said, CLOSE))


def _name(one: Verdict) -> tuple[str, ...]:
    return (one.method, one.beats, one.bench, one.options)


def _pages() -> dict[Path, str]:
    pages: dict[Path, str] = {}
    index = [
        "# Methods",
        "",
        "Written by `make docs`.",
        "",
        "| method | needs | what it does | lines |",
        "|---|---|---|---:|",
    ]
    for verb in catalogue.VERBS:
        for method in catalogue.methods(verb):
            pages[DOCS / "methods" / verb / f"{method.name}.md"] = page(method) + "\n"
            source = Path(sys.modules[method.run.__module__].__file__ or "")
            lines = len(source.read_text().splitlines())
            link = f"[{method.id}]({verb}/{method.name}.md)"
            index.append(f"| {link} | {method.needs} | {method.summary} | {lines} |")
    pages[DOCS / "methods" / "index.md"] = "\n".join(index) + "\n"
    pages[DOCS / "servers.md"] = _servers()
    pages[DOCS / "coverage.md"] = coverage()
    pages[DOCS / "troubleshooting.md"] = troubleshooting()
    return pages


def _servers() -> str:
    lines = [
        "# Servers",
        "",
        "Written by `make docs` from `export/servers.py`. `--server NAME` holds a plan to these",
        "rules before any work; a plan file keeps the name: an edited plan is held to them again.",
        "Without `--format` the first format of the server is written. A dash is whatever the",
        "format holds. No server loads files that leave pruned weights out (`--format layerwise`):",
        "the others store zeros in full. Layers that a server fuses (q/k/v, gate/up) have one grid",
        "in every plan.",
        "",
        "Low-rank corrections lie in `OUT/adapter/`, a PEFT LoRA adapter with a scaling of 1.",
        "`layerwise.load` and `layerwise evaluate` load both. By hand:",
        "",
        "- vLLM: `vllm serve OUT --enable-lora --max-lora-rank N --lora-modules new=OUT/adapter`,",
        "  N the next of 1, 8, 16, 32, 64, 128, 256, 320, 512; then ask for the model `new`.",
        "- peft: `PeftModel.from_pretrained(model, 'OUT/adapter')`, over compressed-tensors with a",
        "  model loaded with `quantization_config=CompressedTensorsConfig(dequantize=True)`.",
        "",
        "| server | format | bits | groups (0: a row) | zero points | rank up to | "
        "inputs rounded to | one grid in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    sources: list[str] = []
    for server, formats in SERVERS.items():
        for format, rules in formats.items():
            cells = (
                server,
                format,
                _by_codes(rules.widths),
                _by_codes(rules.groups),
                "no" if rules.symmetric else "-",
                "-" if rules.rank is None else str(rules.rank),
                "-" if rules.inputs is None else ", ".join(rules.inputs),
                {"model": "all layers", "experts": "a block's experts", "fused": "-"}[rules.alike],
            )
            lines.append(f"| {' | '.join(cells)} |")
            for rule, source in rules.sources.items():
                sources.append(f"- {server}, {format}, {rule}: {source}")
    return "\n".join([*lines, "", "Where the rules were found:", "", *sources]) + "\n"


def _by_codes(allowed: Mapping[Codes, Sequence[int]] | None) -> str:
    if allowed is None:
        return "-"
    listed = {codes: ", ".join(map(str, numbers)) for codes, numbers in allowed.items()}
    return "; ".join(f"{codes} {numbers}" for codes, numbers in listed.items())


def _claims(verdicts: Sequence[Verdict], recorded: Sequence[str]) -> str:
    """The page, with the rows that were written down of methods which were not checked now."""
    lines = [
        "# Claims",
        "",
        "Written by `python scripts/make_docs.py --claims`. Loss: excess cross-entropy over the",
        "original on held-out text, nats per token; on `digits-mlp` the error rate, on `mnist-vit`",
        "how much that grows. For `sparsify` work is left out while the model runs. On",
        "`digits-clients` it is the error rate after 15 rounds of clients; on `digits-experts`",
        "that of a merge of three classifiers, over the kinds of pictures they were tuned to (or",
        "three others: `-unseen`); on `stories260k-tuned` what a merge loses on both texts beyond",
        "the model tuned to each. A claim holds when the loss is below the baseline's by the",
        "margin; within 2% of what it may be (6% where codes are learned) another machine's sums",
        "could turn it, and it is too close to tell. One that does not hold stays here with its",
        "figures. Models but `builtin-tiny` and those of digits are the assets'; in",
        "`bytes-wikitext-outliers` a few inputs of each layer were made 30 times as large, in a",
        "way that leaves the model's function as it was.",
        "",
        "| method | against | bench | options | loss | baseline | ratio | margin | verdict | "
        "source |",
        "|---|---|---|---|---:|---:|---:|---:|---|---|",
    ]
    rows: dict[str, list[str]] = {method: [] for method in _methods()}
    checked = {one.method for one in verdicts}
    for row in recorded:
        method = row.split()[1]
        if method in rows and method not in checked:
            rows[method].append(row)
    for one in verdicts:
        figures = ("-", "-", "-")
        if one.loss is not None and one.baseline is not None:
            ratio = f"{one.loss / one.baseline:.3f}" if one.baseline else "-"
            figures = (f"{one.loss:.4f}", f"{one.baseline:.4f}", ratio)
        cells = (
            *_name(one),
            *figures,
            f"{one.margin:.0%}",
            one.verdict,
            one.source,
        )
        rows[one.method].append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *itertools.chain.from_iterable(rows.values())]) + "\n"


def _methods() -> list[str]:
    """The ids of all methods, in the order of the catalogue."""
    return [method.id for verb in catalogue.VERBS for method in catalogue.methods(verb)]


if __name__ == "__main__":
    sys.exit(main())
