"""The port at which ranks join: free, and out of the way of connections that other processes open meanwhile."""

import random
import socket

import pytest

from homodistil.distributed import free_port as module
from homodistil.distributed.free_port import free_port


@pytest.fixture
def ephemeral_range(tmp_path, monkeypatch):
    path = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(module, "EPHEMERAL_RANGE", path)
    return path


def test_it_can_be_listened_on_at_every_address():
    with socket.create_server(("", free_port())):
        pass


def test_it_is_no_port_that_the_kernel_gives_to_connections(ephemeral_range):
    ephemeral_range.write_text("20050\t60999\n")
    assert all(module.LOWEST_PORT <= free_port() < 20050 for _ in range(50))


def test_one_that_is_taken_is_not_chosen(ephemeral_range, monkeypatch):
    taken = free_port()
    monkeypatch.setattr(module, "LOWEST_PORT", taken)
    ephemeral_range.write_text(f"{taken + 3} 60999")
    with socket.create_server(("", taken)):
        assert taken not in {free_port() for _ in range(50)}


def test_seeds_of_a_job_do_not_decide(ephemeral_range):
    drawn = set()
    for _ in range(8):
        random.seed(1)
        drawn.add(free_port())
    assert len(drawn) > 1


@pytest.mark.parametrize("content", ["1024 65535", "20000 20001", "", "none", None])
def test_a_machine_that_leaves_no_range_or_says_nothing(content, ephemeral_range):
    if content is not None:
        ephemeral_range.write_text(content)
    with socket.create_server(("", free_port())):
        pass
