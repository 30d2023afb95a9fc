"""One fork server and one small teacher for the tests that start the small job."""

from support.job_fixtures import run_inputs, server  # noqa: F401
