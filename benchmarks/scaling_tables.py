"""The numbers of `scaling.py` as rows and Markdown; predictions are made here, from `communication.py`."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys

from communication import Job, Network, Prediction, predict
from report import environment_text, row


def calibrated_network(collectives: dict, num_ranks: int) -> Network:
    """The two constants of a ring whose all-reduce takes the time that was measured."""
    hops = num_ranks - 1
    bandwidth = 2 * hops / num_ranks / collectives["seconds_per_byte"]
    return Network(
        gpus_per_node=num_ranks, inside_bytes_per_s=bandwidth, inside_latency_s=collectives["latency_s"] / (2 * hops)
    )


def predicted_together(jobs: dict[str, dict], num_ranks: int) -> Prediction:
    """The step of all ranks from the jobs side by side and the calibration; gloo overlaps nothing."""
    apart = jobs["side by side"]
    job = Job(
        parameters=apart["parameters"],
        stage=apart["stage"],
        compute_s=statistics.median(apart["step_s"]) - apart["optimizer_s"],
        optimizer_s=apart["optimizer_s"],
        micro_batches=apart["micro_batches"],
        gradient_bytes=apart["weight_bytes"],
        weight_bytes=apart["weight_bytes"],
    )
    return predict(job, calibrated_network(jobs["together"]["collectives"], num_ranks), num_ranks)


def network_of(args: argparse.Namespace) -> Network:
    return Network(
        gpus_per_node=args.gpus_per_node,
        inside_bytes_per_s=args.inside_gb_per_s * 1e9,
        outside_bytes_per_s=args.outside_gb_per_s * 1e9,
        inside_latency_s=args.inside_latency_us * 1e-6,
        outside_latency_s=args.outside_latency_us * 1e-6,
    )


def job_of(args: argparse.Namespace, sequences: float) -> Job:
    """One micro-batch of `sequences` on a GPU; tokens/s as given, whatever the micro-batch."""
    compute_s = sequences * args.seq_len / args.tokens_per_s
    return Job(args.parameters, args.stage, compute_s, overlap=args.overlap)


def predictions(args: argparse.Namespace, gpus: list[int]) -> dict[str, dict[int, tuple[Prediction, Prediction]]]:
    """ "weak" and "strong" -> GPUs -> (as asked for, without any overlap)."""
    network, found = network_of(args), {"weak": {}, "strong": {}}
    for count in gpus:
        sequences = {"weak": args.sequences_per_gpu, "strong": args.global_batch_size / count}
        for kind, share in sequences.items():
            job = job_of(args, share)
            alone = dataclasses.replace(job, overlap=0.0)
            found[kind][count] = predict(job, network, count), predict(alone, network, count)
    return found


def rows(measured: dict[int, dict], args: argparse.Namespace, gpus: list[int], config: dict) -> list[dict]:
    found = []
    for num_ranks, jobs in measured.items():
        for name, job in jobs.items():
            milliseconds = [seconds * 1e3 for seconds in job["step_s"]]
            found.append(row("scaling", f"measured, {name}", "step_ms", "ms", num_ranks, milliseconds, config))
        predicted = predicted_together(jobs, num_ranks).step_s * 1e3
        found.append(row("scaling", "predicted, together", "step_ms", "ms", num_ranks, [predicted], config))
        for num_bytes, seconds in jobs["together"]["collectives"]["points"]:
            variant = f"all-reduce, {num_ranks} ranks"
            found.append(row("scaling", variant, "milliseconds", "ms", num_bytes, [seconds * 1e3], config))
    inputs = config | {key: value for key, value in vars(args).items() if isinstance(value, (int, float))}
    for kind, by_count in predictions(args, gpus).items():
        for count, (asked, without) in by_count.items():
            for variant, found_here in ((kind, asked), (f"{kind}, no overlap", without)):
                name = f"PREDICTION, {variant}"
                found.append(row("scaling", name, "step_ms", "ms", count, [found_here.step_s * 1e3], inputs))
                found.append(row("scaling", name, "efficiency", "ratio", count, [efficiency(found_here)], inputs))
    return found


def efficiency(found: Prediction) -> float:
    """The arithmetic's share of the step."""
    return found.compute_s / found.step_s


def report(measured: dict[int, dict], args: argparse.Namespace, gpus: list[int]) -> str:
    parts = [
        "# Scaling of the training step",
        environment_text(),
        f"    {' '.join(['python', 'benchmarks/scaling.py', *sys.argv[1:]])}",
        "How numbers are taken: head of `benchmarks/scaling.py`. Formulas: head of `benchmarks/communication.py`.",
        *[_measured(jobs, num_ranks, args) for num_ranks, jobs in measured.items()],
        _predicted(args, gpus),
    ]
    return "\n\n".join(parts)


def _measured(jobs: dict[str, dict], num_ranks: int, args: argparse.Namespace) -> str:
    steps = {name: statistics.median(job["step_s"]) * 1e3 for name, job in jobs.items()}
    predicted, collectives = predicted_together(jobs, num_ranks), jobs["together"]["collectives"]
    network = calibrated_network(collectives, num_ranks)
    lines = [
        f"## Measured: {args.shape}, {num_ranks} ranks on this machine, {args.deepspeed.name}",
        "",
        "| job | step ms | tokens/s a rank | efficiency |",
        "|---|--:|--:|--:|",
    ]
    for name, milliseconds in steps.items():
        tokens = jobs["alone"]["tokens"] * 1e3 / milliseconds
        lines.append(f"| {name} | {milliseconds:.1f} | {tokens:,.0f} | {steps['alone'] / milliseconds:.0%} |")
    lines += [
        "",
        f"All-reduce over {collectives['backend']}: {collectives['latency_s'] * 1e6:.0f} us + bytes x "
        f"{collectives['seconds_per_byte'] * 1e9:.2f} ns: hop {network.inside_latency_s * 1e6:.0f} us, "
        f"{network.inside_bytes_per_s / 1e9:.2f} GB/s.",
        "",
        f"Predicted step of all together: {predicted.step_s * 1e3:.1f} ms (arithmetic {predicted.compute_s * 1e3:.1f}, "
        f"gradients {predicted.reduction_s * 1e3:.1f}, weights {predicted.gather_s * 1e3:.1f}, small "
        f"{predicted.small_s * 1e3:.1f}); measured: {steps['together']:.1f} ms, "
        f"{steps['together'] / (predicted.step_s * 1e3) - 1:+.0%}.",
    ]
    return "\n".join(lines)


def _predicted(args: argparse.Namespace, gpus: list[int]) -> str:
    network, found = network_of(args), predictions(args, gpus)
    source = f"`{args.throughput.name}`" if args.throughput else "--tokens-per-s (no measurement)"
    lines = [
        "## PREDICTION for GPUs (not measured)",
        "",
        f"Inputs: {args.tokens_per_s:,.0f} tokens/s a GPU from {source}; {args.parameters / 1e6:.1f} M parameters "
        f"(full width: the most that is ever sent), 2 bytes each, ZeRO-{args.stage}; {args.seq_len} tokens a sequence; "
        f"machines of {network.gpus_per_node} GPUs, {network.inside_bytes_per_s / 1e9:.0f} GB/s and "
        f"{network.inside_latency_s * 1e6:.0f} us a hop inside, {network.outside_bytes_per_s / 1e9:.0f} GB/s a GPU and "
        f"{network.outside_latency_s * 1e6:.0f} us between machines; at most {args.overlap:.0%} of the reduction "
        "hidden.",
        "",
        "step = compute + reduction - hidden + weights + small; efficiency = compute / step. Weak: "
        f"{args.sequences_per_gpu} sequences a GPU. Strong: {args.global_batch_size} in all, tokens/s a GPU taken as "
        "constant, which small micro-batches do not reach. Stragglers, congestion and input are not in the model.",
        "",
        "| GPUs | weak: step ms | of it sent, not hidden | efficiency | without overlap | M tokens/s | "
        "strong: step ms | efficiency | without overlap |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for count in gpus:
        (weak, weak_alone), (strong, strong_alone) = found["weak"][count], found["strong"][count]
        sent = weak.step_s - weak.compute_s
        rate = count * args.sequences_per_gpu * args.seq_len / weak.step_s / 1e6
        lines.append(
            f"| {count} | {weak.step_s * 1e3:.1f} | {sent * 1e3:.2f} | {efficiency(weak):.0%} "
            f"| {efficiency(weak_alone):.0%} | {rate:,.1f} | {strong.step_s * 1e3:.1f} | {efficiency(strong):.0%} "
            f"| {efficiency(strong_alone):.0%} |"
        )
    return "\n".join(lines)
