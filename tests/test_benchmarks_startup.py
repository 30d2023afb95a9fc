"""The start-up profile's formula, on totals made up from known parts."""

import pytest

from benchmarks.startup import EXTRAPOLATED, LAYOUTS, fit, predict


def test_the_parts_are_found_again_and_extrapolated():
    parts = {"once": 100.0, "per_machine": 20.0, "per_rank": 3.0}
    found = {layout: {"bytes_read": predict(parts, layout)} for layout in LAYOUTS}
    assert found[4, 2]["bytes_read"] == 100 + 2 * 20 + 4 * 3
    assert fit(found, "bytes_read") == pytest.approx(parts)
    assert predict(fit(found, "bytes_read"), EXTRAPOLATED) == pytest.approx(100 + 64 * 20 + 512 * 3)
