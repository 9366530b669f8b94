"""Every law catches a method that was broken on purpose to break it."""

import importlib

import pytest

from layerwise.core.catalogue import VERBS
from layerwise.testing import laws_in
from layerwise.testing.check import EVERY_VERB

CASES = [(file, law) for file in (EVERY_VERB, *VERBS) for law in laws_in(file)]


@pytest.mark.parametrize(
    ("file", "law"), CASES, ids=[f"{file}-{law.__name__}" for file, law in CASES]
)
def test_law_bites(file, law):
    wrong = importlib.import_module(f"testing.broken_{file}").BROKEN
    assert law.__name__ in wrong, f"tests/testing/broken_{file}.py has no method that breaks it"
    with pytest.raises(AssertionError):
        law(wrong[law.__name__])


@pytest.mark.parametrize("file", [EVERY_VERB, *VERBS])
def test_every_broken_method_breaks_a_law(file):
    wrong = importlib.import_module(f"testing.broken_{file}").BROKEN
    assert wrong.keys() == {law.__name__ for law in laws_in(file)}
