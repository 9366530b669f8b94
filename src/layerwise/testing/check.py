"""Run a method through the laws of its verb."""

import importlib
import inspect
from collections.abc import Callable, Iterator

from layerwise.core.catalogue import Method

Law = Callable[[Method], None]

EVERY_VERB = "every_verb"


def laws(verb: str) -> Iterator[Law]:
    """Laws of every verb, then laws of this one."""
    for file in (EVERY_VERB, verb):
        yield from laws_in(file)


def laws_in(file: str) -> Iterator[Law]:
    """Laws of one file of `layerwise.testing.laws`.  A law is a public function of its file."""
    module = importlib.import_module(f"layerwise.testing.laws.{file}")
    for name, law in inspect.getmembers(module, inspect.isfunction):
        if law.__module__ == module.__name__ and not name.startswith("_"):
            yield law


def check(method: Method) -> None:
    """Hold a method to every law of its verb.

    Raises:
        AssertionError: The method breaks a law, or is exempt from a law that it obeys or that
            does not exist.  The message lists every such law.
    """
    known = {law.__name__: law for law in laws(method.verb)}
    wrong = [f"{name}: exempt, but there is no such law" for name in method.exempt.keys() - known]
    for name, law in known.items():
        broken = _broken(law, method)
        if broken is not None and name not in method.exempt:
            wrong.append(f"{name}: {broken}")
        if broken is None and name in method.exempt:
            wrong.append(f"{name}: exempt, but the method obeys it")
    if wrong:
        raise AssertionError("\n".join((f"{method.id} breaks {len(wrong)} laws", *wrong)))


def _broken(law: Law, method: Method) -> str | None:
    """How the method breaks the law; None if it obeys."""
    try:
        law(method)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
