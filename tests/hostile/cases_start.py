"""How ranks are started: variables that a launcher would have set."""

from __future__ import annotations

from case import Case


def _variable(case: str, name: str, value: str, *says: str, **others: str) -> Case:
    return Case(case, lambda w: w.train(), says=[f"{name}: found", *says], ranks=1, env={name: value, **others})


CASES = [
    _variable("rank_is_a_word", "RANK", "first", "'first'", "0 .. 0"),
    _variable("rank_is_negative", "RANK", "-1", "'-1'"),
    _variable("rank_is_no_ascii_number", "RANK", "\u0661", "0 .. 0"),
    _variable("rank_beyond_the_world", "RANK", "2", "'2'", "0 .. 1", WORLD_SIZE="2"),
    _variable("world_size_is_zero", "WORLD_SIZE", "0", "'0'"),
    _variable("world_size_is_a_fraction", "WORLD_SIZE", "2.0", "'2.0'"),
    _variable("world_size_has_a_thousand_digits", "WORLD_SIZE", "9" * 1000, "1 .. "),
    _variable("local_rank_is_empty", "LOCAL_RANK", "", "''"),
    _variable("port_is_a_word", "MASTER_PORT", "http", "'http'", "1 .. 65535"),
    _variable("port_beyond_all_ports", "MASTER_PORT", "70000", "'70000'"),
    Case("address_is_empty", lambda w: w.train(), says=["MASTER_ADDR", "not set"], ranks=1, env={"MASTER_ADDR": ""}),
]
