"""The page docs/troubleshooting.md: every message with which layerwise refuses, and the remedy.

Messages are read off the source: what is filled in when they are raised is written in capitals.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "layerwise"
INTRODUCTION = """# Troubleshooting

Written by `make docs` from the source: every message with which layerwise refuses, by the part that
says it, and what to do. CAPITALS stand for what is filled in. A refusal comes before any work is
lost: nothing was written over, and a stopped run goes on when its command is repeated. Any other
error is a defect of layerwise; please report it with the lines it printed.
"""


def troubleshooting() -> str:
    """The page."""
    lines = [INTRODUCTION]
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        found = sorted(set(_refusals(tree)))
        if not found:
            continue
        says = (ast.get_docstring(tree) or file.stem).partition("\n")[0].rstrip(".")
        lines += [f"## {file.relative_to(SOURCE).with_suffix('')}", "", f"{says}.", ""]
        lines += [f"- **{problem}** {remedy}" for problem, remedy in found]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _refusals(tree: ast.Module) -> Iterator[tuple[str, str]]:
    known = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant | ast.JoinedStr)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="UserError"), args=[problem, remedy]):
                remedies = " ".join(dict.fromkeys(_texts(remedy, known)))
                # One that only hands on a message says nothing of its own.
                yield from ((one, remedies) for one in _texts(problem, known) if not one.isupper())
            case _:
                pass


def _texts(node: ast.expr, known: Mapping[str, ast.expr]) -> list[str]:
    """What an expression can say, with what is filled in by name."""
    if isinstance(node, ast.IfExp):
        return _texts(node.body, known) + _texts(node.orelse, known)
    return [_text(node, known)]


def _text(node: ast.expr, known: Mapping[str, ast.expr]) -> str:
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(_text(part, known) for part in node.values)
        case ast.FormattedValue():
            return _text(node.value, known)
        case ast.BinOp(op=ast.Add()):
            return _text(node.left, known) + _text(node.right, known)
        case ast.Name() if node.id in known:
            return _text(known[node.id], known)
        case _:
            name = next(_names(node), "…")
            return name.strip("_").upper().replace("_", " ")


def _names(node: ast.AST) -> Iterator[str]:
    """What an expression is made from, and not what is done to it."""
    match node:
        case ast.Call():
            for argument in node.args:
                yield from _names(argument)
            if isinstance(node.func, ast.Attribute):
                yield from _names(node.func.value)
        case ast.Attribute():
            yield node.attr
        case ast.Name():
            yield node.id
        case _:
            for child in ast.iter_child_nodes(node):
                yield from _names(child)
