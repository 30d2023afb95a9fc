"""launcher/plan.py: what it is told of machines and money, and runs that no plan could be made of."""

from __future__ import annotations

from case import Case, Workspace

DEVICE = ("--device", "H100")


def plan(name: str, *arguments: str, says: list[str]) -> Case:
    """A plan with these arguments; `says` as in Case."""

    def build(w: Workspace) -> list[str]:
        return w.train(*arguments, *(DEVICE if "--device" not in arguments else ()), script="plan")

    return Case(name, build, says=says, ranks=1)


CASES = [
    plan("plan_price_nan", "--price", "nan", "2", says=["--price", "nan"]),
    plan("plan_price_infinite", "--price", "1", "inf", says=["--price", "inf"]),
    plan("plan_price_negative", "--price", "-1", "2", says=["--price"]),
    plan("plan_price_reversed", "--price", "5", "2", says=["--price", "lower price first"]),
    plan("plan_price_text", "--price", "cheap", "2", says=["--price"]),
    plan("plan_watts_nan", "--watts", "nan", says=["--watts", "nan"]),
    plan("plan_watts_infinite", "--watts", "inf", says=["--watts", "inf"]),
    plan("plan_no_nodes", "--nodes", "0", says=["--nodes", "found 0"]),
    plan("plan_nodes_negative", "--nodes", "-4", says=["--nodes"]),
    plan("plan_nodes_huge", "--nodes", "1000000000000", says=["--nodes"]),
    plan("plan_no_devices", "--devices-per-node", "0", says=["--devices-per-node"]),
    plan("plan_device_unknown", "--device", "H1000", says=["--device", "H1000"]),
    plan("plan_interconnect_unknown", "--nodes", "2", "--interconnect", "string", says=["--interconnect", "string"]),
    plan("plan_json_is_a_folder", "--json", "/tmp", says=["--json", "is a folder"]),
    plan("plan_10_to_10_steps", "train.steps=10000000000", says=["train.steps", "allowed [1, 1000000000]"]),
    plan(
        "plan_too_many_events",
        "train.steps=1000000000",
        "pruning.interval_steps=1",
        says=["pruning.interval_steps: found 1", "allowed are 100000"],
    ),
    plan("plan_unknown_option", "--devises", "3", says=["--devises"]),
    plan("plan_unknown_field", "train.stepz=3", says=["train.stepz"]),
]
