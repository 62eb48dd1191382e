"""Both implementations of the operators, chosen as a user would."""

from __future__ import annotations

import pytest

from megactl.engine.ops import library


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled operators. Where they are missing the test is skipped, or fails if MEGACTL_OPS=compiled demands them."""
    if library.mode() == "auto" and library.load():
        pytest.skip(str(library.load()))
    monkeypatch.setenv("MEGACTL_OPS", "compiled")
    assert library.use_compiled()


@pytest.fixture(params=["compiled", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test on the compiled operators and on the reference."""
    if request.param == "compiled":
        request.getfixturevalue("compiled")
    else:
        monkeypatch.setenv("MEGACTL_OPS", "torch")
    return request.param
