"""What tests of evaluation share."""

import pytest


@pytest.fixture
def no_load(monkeypatch):
    """No model may be loaded: what is refused or known must be so before."""
    from layerwise.flow import assessing

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(assessing, "load", refuse)
