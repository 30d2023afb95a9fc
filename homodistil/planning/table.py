"""A plan as text."""

from __future__ import annotations

from homodistil.planning.plan import Plan, StretchPlan

_SHOWN = 6


def format_plan(plan: Plan) -> str:
    """The plan as text in three blocks: run and machines, phases, sums with advice. No trailing newline."""
    return "\n\n".join(["\n".join(_head(plan)), _table(_some(plan.stretches)), "\n".join(_sums(plan))])


def _head(plan: Plan) -> list[str]:
    cluster = plan.cluster
    link = f", {cluster.interconnect}" if cluster.num_nodes > 1 else ""
    num_steps = sum(stretch.num_steps for stretch in plan.stretches)
    lines = [
        f"{plan.teacher} to hidden {plan.stretches[-1].hidden_size}: {num_steps:,} steps of {plan.global_batch_size:,} "
        f"sequences",
        f"{cluster.num_nodes} x {cluster.num_devices} {cluster.device.name}{link}, ZeRO-{plan.zero_stage}, micro-batch "
        f"{plan.micro_batch_size}",
        plan.basis,
    ]
    return lines + plan.notes


def _some(stretches: list[StretchPlan]) -> list[StretchPlan]:
    """The phases to print: the first, the last, the one with most memory, and some between."""
    if len(stretches) <= _SHOWN:
        return stretches
    last = len(stretches) - 1
    fullest = max(range(len(stretches)), key=lambda i: stretches[i].total_bytes)
    return [stretches[i] for i in sorted({fullest, *(round(k * last / (_SHOWN - 1)) for k in range(_SHOWN))})]


def _table(stretches: list[StretchPlan]) -> str:
    parts = list(stretches[0].memory)
    heading = ["hidden", "parameters", "steps", *(f"{name} MB" for name in parts), "rank MB", "s per step", "tokens/s"]
    rows = [heading]
    for s in stretches:
        rows.append(
            [f"{s.hidden_size}", f"{s.parameters / 1e6:.2f} M", f"{s.num_steps:,}"]
            + [f"{value / 1e6:,.0f}" for value in s.memory.values()]
            + [f"{s.total_bytes / 1e6:,.0f}", f"{s.step.low:.3g}-{s.step.high:.3g}", f"{s.tokens_per_s:,.0f}"]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(heading))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _sums(plan: Plan) -> list[str]:
    low, high = plan.device_hours
    advice = plan.advice
    stage = "no ZeRO stage fits" if advice.zero_stage is None else f"advised: ZeRO-{advice.zero_stage}"
    return [
        f"peak memory per rank: {plan.peak_bytes / 1e9:.2f} GB of {plan.cluster.device.memory_bytes / 1e9:.0f} GB",
        f"training: {_range(plan.hours.low, plan.hours.high)} h, {_range(low, high)} device hours, "
        f"{_range(*plan.kwh)} kWh, {_range(*plan.usd)} USD (no start, evaluation, checkpoints or controls)",
        f"{stage}, micro-batch up to {advice.micro_batch_size}: {advice.reason}",
    ]


def _range(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}"
