"""Between real ranks: values of any length arrive, and a pickle from a stranger is not read."""


def test_values_of_any_length(server):
    job = server.start("wire_jobs:exchange", [[0, 900, 1000, 1016, 1017, 5000, 300_000]])
    assert job.wait(timeout_s=60) == [0, 0], job.output()
    assert job.output().count("all arrived") == 2


def test_a_pickle_in_the_jobs_store_is_not_read(server, tmp_path):
    caught = tmp_path / "caught"
    job = server.start("wire_jobs:meet_a_stranger", [str(caught)])
    assert job.wait(timeout_s=60) == [0, 0], job.output()
    assert "taken for a value" not in job.output() and not caught.exists()
