"""`homodistil.train.run` twice in one process, as in a notebook: the second run is the first one, bit by bit, and so is
one of another process. Dropout is drawn as well, by every rank for itself."""

import pytest
from support.small_job import TRAIN, arguments, differences, result


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_second_run_in_one_process_equals_the_first(server, run_inputs, reference, tmp_path, num_ranks):
    first, second, apart = (tmp_path / name for name in ("first", "second", "apart"))
    jobs = [arguments(run_inputs, folder, "student.dropout=0.1") for folder in (first, second, apart)]
    job = server.start("again_jobs:run_twice", jobs[:2], num_ranks=num_ranks)
    assert job.wait(timeout_s=240) == [0] * num_ranks, job.output()
    server.run(TRAIN, jobs[2], num_ranks, timeout_s=240)
    assert differences(result(first), result(second)) == differences(result(first), result(apart)) == []
    check_that_it_acts_in_training_alone(first, reference)


def check_that_it_acts_in_training_alone(dropping_out, reference):
    """Both are the teacher at the start: evaluated they are the same, and trained they are not."""
    with_dropout, without = (result(folder)["metrics.jsonl"] for folder in (dropping_out, reference))
    evaluated, expected = with_dropout[0], without[0]
    assert evaluated.pop("kind") == expected.pop("kind") == "evaluation"
    assert evaluated == pytest.approx(expected, rel=1e-5, abs=1e-6)
    trained, plain = (next(line for line in lines[1:] if line["kind"] == "train") for lines in (with_dropout, without))
    assert plain["loss/kl"] < 1e-6 < 1e-2 < trained["loss/kl"]
