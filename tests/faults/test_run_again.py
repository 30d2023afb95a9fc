"""`homodistil.train.run` twice in one process, as in a notebook: the second run is the first one, bit by bit."""

import pytest
from support.small_job import arguments, differences, result


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_second_run_in_one_process_equals_the_first(server, run_inputs, tmp_path, num_ranks):
    first, second = tmp_path / "first", tmp_path / "second"
    jobs = [arguments(run_inputs, folder) for folder in (first, second)]
    job = server.start("again_jobs:run_twice", jobs, num_ranks=num_ranks)
    assert job.wait(timeout_s=240) == [0] * num_ranks, job.output()
    assert differences(result(first), result(second)) == []
