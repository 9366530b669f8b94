"""Run a method through the laws of its verb."""

import importlib
import inspect
from collections.abc import Callable, Iterator

from layerwise.core.catalogue import Method

Law = Callable[[Method], None]

EVERY_VERB = "every_verb"
OBEYED, BROKEN = "ok", "BROKEN: "


def laws_of(verb: str) -> Iterator[Law]:
    """Laws of every verb, then laws of this one."""
    for file in (EVERY_VERB, verb):
        yield from laws_in(file)


def laws_in(file: str) -> Iterator[Law]:
    """Laws of one file of `layerwise.testing.laws`.  A law is a public function of its file."""
    module = importlib.import_module(f"layerwise.testing.laws.{file}")
    for name, law in inspect.getmembers(module, inspect.isfunction):
        if law.__module__ == module.__name__ and not name.startswith("_"):
            yield law


def verdicts(method: Method) -> dict[str, str]:
    """What becomes of a method under every law of its verb, by the law's name.

    Returns:
        "ok", "exempt: <reason>", or what begins with `BROKEN`: the law is broken, or the method
        is exempt from a law that it obeys or that does not exist.
    """
    found: dict[str, str] = {}
    for law in laws_of(method.verb):
        broken, exempt = _broken(law, method), method.exempt.get(law.__name__)
        if broken is None:
            verdict = OBEYED if exempt is None else f"{BROKEN}exempt, but the method obeys it"
        else:
            verdict = BROKEN + broken if exempt is None else f"exempt: {exempt}"
        found[law.__name__] = verdict
    unknown = method.exempt.keys() - found.keys()
    return found | dict.fromkeys(sorted(unknown), f"{BROKEN}exempt, but there is no such law")


def check(method: Method) -> None:
    """Hold a method to every law of its verb.

    Raises:
        AssertionError: A verdict is `BROKEN`.  The message lists every such law.
    """
    wrong = [
        f"{name}: {verdict.removeprefix(BROKEN)}"
        for name, verdict in verdicts(method).items()
        if verdict.startswith(BROKEN)
    ]
    if wrong:
        raise AssertionError("\n".join((f"{method.id} breaks {len(wrong)} laws", *wrong)))


def _broken(law: Law, method: Method) -> str | None:
    """How the method breaks the law; None if it obeys."""
    try:
        law(method)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
