"""The numbers of `scaling.py` as rows and as a page; predictions are made here, from `communication.py`."""

from __future__ import annotations

import argparse
import dataclasses
import statistics

from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page
from benchmarks.harness.table import table
from benchmarks.speed.communication import Job, Network, Prediction, predict


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


def predictions(args: argparse.Namespace, gpus: list[int]) -> dict[str, dict[int, tuple[Prediction, Prediction]]]:
    """ "weak" and "strong" -> GPUs -> (as asked for, without any overlap). One micro-batch; tokens/s as given."""
    network, made = network_of(args), {"weak": {}, "strong": {}}
    for count in gpus:
        sequences = {"weak": args.sequences_per_gpu, "strong": args.global_batch_size / count}
        for kind, share in sequences.items():
            compute_s = share * args.seq_len / args.tokens_per_s
            job = Job(args.parameters, args.stage, compute_s, overlap=args.overlap)
            without = dataclasses.replace(job, overlap=0.0)
            made[kind][count] = predict(job, network, count), predict(without, network, count)
    return made


def efficiency(prediction: Prediction) -> float:
    """The arithmetic's share of the step."""
    return prediction.compute_s / prediction.step_s


def rows(measured: dict[int, dict], args: argparse.Namespace, gpus: list[int], config: dict) -> Rows:
    made = Rows("scaling", config)
    for num_ranks, jobs in measured.items():
        for name, job in jobs.items():
            made.add(f"measured, {name}", "step_ms", "ms", num_ranks, [seconds * 1e3 for seconds in job["step_s"]])
        predicted = predicted_together(jobs, num_ranks)
        made.add("predicted, together", "step_ms", "ms", num_ranks, predicted.step_s * 1e3)
        for num_bytes, seconds in jobs["together"]["collectives"]["points"]:
            made.add(f"all-reduce, {num_ranks} ranks", "milliseconds", "ms", num_bytes, seconds * 1e3)
    inputs = {key: value for key, value in vars(args).items() if isinstance(value, (int, float))}
    for kind, by_count in predictions(args, gpus).items():
        for count, both in by_count.items():
            for variant, prediction in zip((kind, f"{kind}, no overlap"), both, strict=True):
                name = f"PREDICTION, {variant}"
                made.add(name, "step_ms", "ms", count, prediction.step_s * 1e3, **inputs)
                made.add(name, "efficiency", "ratio", count, efficiency(prediction), **inputs)
    return made


def report(measured: dict[int, dict], args: argparse.Namespace, gpus: list[int]) -> str:
    how = (
        "How numbers are taken: head of `benchmarks/speed/scaling.py`. Formulas: head of "
        "`benchmarks/speed/communication.py`."
    )
    parts = [_measured(jobs, num_ranks, args) for num_ranks, jobs in measured.items()]
    return page("Scaling of the training step", how, *parts, _predicted(args, gpus))


def _measured(jobs: dict[str, dict], num_ranks: int, args: argparse.Namespace) -> str:
    steps = {name: statistics.median(job["step_s"]) * 1e3 for name, job in jobs.items()}
    predicted, collectives = predicted_together(jobs, num_ranks), jobs["together"]["collectives"]
    network, tokens = calibrated_network(collectives, num_ranks), jobs["alone"]["tokens"] * 1e3
    lines = [[name, ms, tokens / ms, steps["alone"] / ms] for name, ms in steps.items()]
    return (
        f"## Measured: {args.shape}, {num_ranks} ranks on this machine, {args.deepspeed.name}\n\n"
        + table(["job", "step ms {:.1f}", "tokens/s per rank {:,.0f}", "efficiency {:.0%}"], lines)
        + f"\n\nAll-reduce over {collectives['backend']}: {collectives['latency_s'] * 1e6:.0f} us + bytes x "
        f"{collectives['seconds_per_byte'] * 1e9:.2f} ns: hop {network.inside_latency_s * 1e6:.0f} us, "
        f"{network.inside_bytes_per_s / 1e9:.2f} GB/s.\n\n"
        f"Predicted step of all together: {predicted.step_s * 1e3:.1f} ms (arithmetic {predicted.compute_s * 1e3:.1f}, "
        f"gradients {predicted.reduction_s * 1e3:.1f}, weights {predicted.gather_s * 1e3:.1f}, small "
        f"{predicted.small_s * 1e3:.1f}); measured: {steps['together']:.1f} ms, "
        f"{steps['together'] / (predicted.step_s * 1e3) - 1:+.0%}."
    )


def _predicted(args: argparse.Namespace, gpus: list[int]) -> str:
    network, made = network_of(args), predictions(args, gpus)
    source = f"`{args.throughput.name}`" if args.throughput else "--tokens-per-s (no measurement)"
    columns = ["GPUs {}", "weak: step ms {:.1f}", "of it sent, not hidden {:.2f}", "efficiency {:.0%}"]
    columns += ["without overlap {:.0%}", "M tokens/s {:,.1f}", "strong: step ms {:.1f}", "efficiency {:.0%}"]
    lines = []
    for count in gpus:
        (weak, weak_alone), (strong, strong_alone) = made["weak"][count], made["strong"][count]
        line = [count, weak.step_s * 1e3, (weak.step_s - weak.compute_s) * 1e3, efficiency(weak)]
        line += [efficiency(weak_alone), count * args.sequences_per_gpu * args.seq_len / weak.step_s / 1e6]
        lines.append([*line, strong.step_s * 1e3, efficiency(strong), efficiency(strong_alone)])
    return (
        "## PREDICTION for GPUs (not measured)\n\n"
        f"Inputs: {args.tokens_per_s:,.0f} tokens/s of a GPU from {source}; {args.parameters / 1e6:.1f} M parameters "
        f"(full width: the most that is ever sent), 2 bytes each, ZeRO-{args.stage}; {args.seq_len} tokens per "
        f"sequence; machines of {network.gpus_per_node} GPUs, {network.inside_bytes_per_s / 1e9:.0f} GB/s and "
        f"{network.inside_latency_s * 1e6:.0f} us per hop inside, {network.outside_bytes_per_s / 1e9:.0f} GB/s "
        f"of a GPU and {network.outside_latency_s * 1e6:.0f} us between machines; at most "
        f"{args.overlap:.0%} of the reduction hidden.\n\n"
        "step = compute + reduction - hidden + weights + small; efficiency = compute / step. Weak: "
        f"{args.sequences_per_gpu} sequences per GPU. Strong: {args.global_batch_size} in all, tokens/s of a GPU taken "
        "as constant, which small micro-batches do not reach. Stragglers, congestion and input are not in the "
        "model.\n\n" + table([*columns, "without overlap {:.0%}"], lines)
    )
