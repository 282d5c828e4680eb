"""What is shared by the tests of kernels and of their choice."""

from __future__ import annotations

import pytest

from fxquant.lowering.tuning import forget


@pytest.fixture(autouse=True)
def _chosen_anew():
    """What was chosen by one test's tables is not remembered in another."""
    forget()
    yield
    forget()
