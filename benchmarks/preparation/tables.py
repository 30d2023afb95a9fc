"""Results of prepare_data.py as rows of JSON and as Markdown."""

from __future__ import annotations

from report import environment_text, row

_LABELS = {
    "alone": "uninterrupted",
    "killed": "killed twice, gone on with",
    "plain": "plain `datasets` script",
    "full": "all of it, killed twice, gone on with",
    "full_alone": "all of it, uninterrupted",
}
_METRICS = {"wall_s": "s", "megabytes_per_s_core": "MB/s", "megabytes_per_cpu_s": "MB/s", "peak_megabytes": "MB"}
_CHECKS = {
    "identity_is_equal": "every file of the killed corpus equals the uninterrupted one's (sha256)",
    "remade_shards_are_equal": "shards of the full run, made again from the text, are what its manifest says",
    "full_is_equal": "at full size, every file of the killed corpus equals the uninterrupted one's (sha256)",
}


def rows(results: dict) -> list[dict]:
    """One row a number."""
    config = {key: results[key] for key in ("gigabytes", "workers", "command")}
    found = []
    for name in filter(results.__contains__, _LABELS):
        part = results[name]
        for metric, unit in _METRICS.items():
            if part.get(metric) is not None:
                own = {**config, **part}
                found.append(row("prepare_data", name, metric, unit, part["gigabytes"], [part[metric]], own))
    for name in filter(results.__contains__, _CHECKS):
        found.append(row("prepare_data", name, "equal", "", results["gigabytes"], [float(results[name])], config))
    return found


def markdown(results: dict) -> str:
    lines = [
        f"# Preparing {results['gigabytes']:g} GB of text, {results['workers']} workers",
        "",
        environment_text(),
        f"* command: `python benchmarks/prepare_data.py {results['command']}`",
        "",
        "| run | GB | starts | s | MB/s a core | MB a second of processor | peak memory of all processes, MB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [_line(_LABELS[name], results[name]) for name in _LABELS if name in results]
    lines += ["", *(_ratio(results)), *(_check(name, results[name]) for name in _CHECKS if name in results)]
    return "\n".join(lines)


def _line(label: str, part: dict) -> str:
    per_cpu = "" if part.get("megabytes_per_cpu_s") is None else f"{part['megabytes_per_cpu_s']:.2f}"
    return (
        f"| {label} | {part['gigabytes']:.2f} | {part.get('starts', 1)} | {part['wall_s']:.0f} | "
        f"{part['megabytes_per_s_core']:.2f} | {per_cpu} | {part['peak_megabytes']:.0f} |"
    )


def _ratio(results: dict) -> list[str]:
    if "plain" not in results:
        return []
    ours, plain = (results[name]["megabytes_per_s_core"] for name in ("alone", "plain"))
    return [f"* uninterrupted, {ours / plain:.2f} times the throughput of the plain script a core"]


def _check(name: str, is_true: bool) -> str:
    return f"* {_CHECKS[name]}: **{'yes' if is_true else 'NO'}**"
