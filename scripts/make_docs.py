"""Write the pages that are generated: one per method, and the list of claims.

python scripts/make_docs.py            # methods
python scripts/make_docs.py --claims   # the claims too; runs them all (minutes)
python scripts/make_docs.py --check    # fail if a method's page is not what would be written
"""

import argparse
import sys
from pathlib import Path

from layerwise.core import catalogue
from layerwise.core.progress import Silent
from layerwise.report import page
from layerwise.testing.claims import Verdict, check_claims

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> int:
    """Write or check the generated pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--claims", action="store_true")
    chosen = parser.parse_args()
    pages = _pages()
    if chosen.check:
        there = {p for p in (DOCS / "methods").rglob("*.md")}
        stale = [p for p, text in pages.items() if not p.exists() or p.read_text() != text]
        stale += there - pages.keys()
        for path in stale:
            print(f"{path} is not what `make docs` writes", file=sys.stderr)
        return int(bool(stale))
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in set((DOCS / "methods").rglob("*.md")) - pages.keys():
        path.unlink()
    if chosen.claims:
        (DOCS / "claims.md").write_text(_claims(check_claims([], Silent())))
    return 0


def _pages() -> dict[Path, str]:
    pages: dict[Path, str] = {}
    index = ["# Methods", "", "| method | needs | what it does | lines |", "|---|---|---|---:|"]
    for verb in catalogue.VERBS:
        for method in catalogue.methods(verb):
            pages[DOCS / "methods" / verb / f"{method.name}.md"] = page(method) + "\n"
            source = Path(sys.modules[method.run.__module__].__file__ or "")
            lines = len(source.read_text().splitlines())
            link = f"[{method.id}]({verb}/{method.name}.md)"
            index.append(f"| {link} | {method.needs} | {method.summary} | {lines} |")
    pages[DOCS / "methods" / "index.md"] = "\n".join(index) + "\n"
    return pages


def _claims(verdicts: list[Verdict]) -> str:
    lines = [
        "# Claims",
        "",
        "Written by `python scripts/make_docs.py --claims`. Loss: excess cross-entropy over the",
        "original on held-out text, nats per token. A claim holds when the loss is below the",
        "baseline's by the margin. One that does not hold stays here with its figures.",
        "",
        "| method | against | bench | options | loss | baseline | ratio | margin | verdict | "
        "source |",
        "|---|---|---|---|---:|---:|---:|---:|---|---|",
    ]
    for one in verdicts:
        figures = ("-", "-", "-")
        if one.loss is not None and one.baseline is not None:
            ratio = f"{one.loss / one.baseline:.3f}" if one.baseline else "-"
            figures = (f"{one.loss:.4f}", f"{one.baseline:.4f}", ratio)
        cells = (
            one.method,
            one.beats,
            one.bench,
            one.options,
            *figures,
            f"{one.margin:.0%}",
            one.verdict,
            one.source,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
