"""SIGKILL at random moments, inside resize events and checkpoint writes too: the run always ends bitwise the same."""

import pytest
from many import Campaign


@pytest.mark.timeout(1800)  # 30 kills: two minutes on an idle machine
@pytest.mark.parametrize(("kills", "inside"), [(4, 1), (30, 8)])
def test_killed_runs_end_as_if_nothing_had_happened(server, run_inputs, reference, tmp_path, kills, inside):
    record = Campaign(server, run_inputs, tmp_path, reference, seed=20261122).run(kills)
    print(record.as_markdown())
    assert not record.wrong, "\n".join(record.wrong)
    assert record.num_kills >= kills and record.num_inside >= inside, record.as_markdown()
