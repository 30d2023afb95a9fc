"""SIGKILL at random moments, inside resize events and checkpoint writes too: the run always ends bitwise the same."""

import pytest
from many import Campaign

KILLS, INSIDE = 30, 8


@pytest.mark.timeout(1800)  # two minutes on an idle machine
def test_killed_runs_end_as_if_nothing_had_happened(server, run_inputs, reference, tmp_path):
    record = Campaign(server, run_inputs, tmp_path, reference, seed=20261122).run(KILLS)
    print(record.as_markdown())
    assert not record.wrong, "\n".join(record.wrong)
    assert record.num_kills >= KILLS and record.num_inside >= INSIDE, record.as_markdown()
