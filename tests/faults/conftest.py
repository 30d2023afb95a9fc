"""One fork server and one small teacher with its text for all fault tests."""

from support.job_fixtures import reference, run_inputs, server  # noqa: F401
