"""A method's page, made from its docstring and signature: the terminal and the docs show it."""

import inspect

from layerwise.core.catalogue import Claim, Method


def page(method: Method) -> str:
    """Everything there is to say about a method, as Markdown."""
    paper = method.paper
    where = f", [arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
    lines = [
        f"# {method.id}",
        "",
        f"*{paper.title}*, {paper.year}{where}",
        "",
        f"Reads {', '.join(f'`{word}`' for word in method.evidence)}; needs {method.needs}.",
        "",
        *_body(inspect.getdoc(method.run) or ""),
        "",
        "## Options",
        "",
        "| option | default |",
        "|---|---|",
        *(f"| `{name}` | {_default(option)} |" for name, option in method.options.items()),
    ]
    if method.exempt:
        lines += ["", "## Laws it is exempt from", ""]
        lines += [f"- `{law}`: {reason}" for law, reason in sorted(method.exempt.items())]
    if method.claims:
        lines += ["", "## Claims", ""]
        lines += [f"- {claim_text(claim)}" for claim in method.claims]
    return "\n".join(lines)


def claim_text(claim: Claim) -> str:
    """A claim in one line."""
    options = ", ".join(f"{name} {value}" for name, value in claim.options.items())
    return f"loss at least {claim.margin:.0%} below {claim.beats} on {claim.bench} ({options})"


def _body(text: str) -> list[str]:
    """A docstring as Markdown: its sections become headings, its indented parts stay as typed."""
    lines: list[str] = []
    section = False
    for line in text.splitlines():
        if line.rstrip(":") in ("Args", "Returns", "Raises") and line.endswith(":"):
            lines += [f"## {line.rstrip(':')}", ""]
            section = True
        elif section and line.startswith("    ") and not line.startswith("     "):
            name, _, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}" if rest else f"- {line.strip()}")
        elif section and line.startswith("     "):
            lines.append("  " + line.strip())
        else:
            lines.append(line)
    return lines


def _default(option: inspect.Parameter) -> str:
    return "required" if option.default is inspect.Parameter.empty else f"`{option.default!r}`"
