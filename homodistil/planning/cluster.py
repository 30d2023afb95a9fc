"""The machines of a plan: GPUs by name with the numbers of their datasheets, their count, and the interconnect."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from homodistil.errors import UserError, nearest


@dataclass(frozen=True)
class Device:
    """The device of one rank, with the numbers of its datasheet."""

    name: str
    driver_name: str
    """Name for `datasheet_flops`; empty if there is no datasheet, so that the speed must be measured."""
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """Bandwidth to the other devices of the machine, in one direction."""
    watts: float
    """Power of the device at full load, without its share of the power of the machine."""
    usd_per_h: tuple[float, float]
    """Usual range of rental prices in November 2026 (our estimate); --price replaces it."""

    def peak_flops(self, number_format: str) -> float | None:
        """Dense FLOP/s in "bf16", "fp16" or "fp32" (tf32 if the device has it); None if not known."""
        from homodistil.metrics.device_peak import datasheet_flops

        names = ["tf32", "fp32"] if number_format == "fp32" else [number_format]
        peaks = [datasheet_flops(self.driver_name, name) for name in names]
        return next((value for value in peaks if value), None)


_GB, _GB_S = 1e9, 1e9
# Memory, bandwidth and power: NVIDIA's datasheet of each product. Links: NVLink has 600 / 900 GB/s in both directions
# together, so half of it in one; PCIe 4.0 x16 has about 32 GB/s in one direction.
DEVICES = {
    "A100-40": Device("A100-40", "A100-SXM4-40GB", 40 * _GB, 1555 * _GB_S, 300 * _GB_S, 400, (1.0, 2.5)),
    "A100-80": Device("A100-80", "A100-SXM4-80GB", 80 * _GB, 2039 * _GB_S, 300 * _GB_S, 400, (1.2, 3.5)),
    "H100": Device("H100", "H100 80GB HBM3", 80 * _GB, 3350 * _GB_S, 450 * _GB_S, 700, (2.0, 5.0)),
    "H200": Device("H200", "H200", 141 * _GB, 4800 * _GB_S, 450 * _GB_S, 700, (2.5, 6.0)),
    "L40S": Device("L40S", "L40S", 48 * _GB, 864 * _GB_S, 32 * _GB_S, 350, (0.8, 2.0)),
    "RTX-4090": Device("RTX-4090", "GeForce RTX 4090", 24 * _GB, 1008 * _GB_S, 32 * _GB_S, 450, (0.3, 0.8)),
}
CPU = "cpu"
INTERCONNECTS = {
    # Bytes per second and device in one direction, from the nominal rate of one adapter.
    "none": 0.0,
    "ethernet-10": 1.25e9,
    "ethernet-100": 12.5e9,
    "infiniband-hdr": 25e9,  # 200 Gb/s
    "infiniband-ndr": 50e9,  # 400 Gb/s
}
POWER_OVERHEAD = 1.5
"""Factor on the power of the devices for machine, cooling and conversion (our estimate; PUE alone is 1.1 to 1.6)."""


@dataclass(frozen=True)
class Cluster:
    device: Device
    num_devices: int
    """Devices (and ranks) per machine."""
    num_nodes: int = 1
    interconnect: str = "none"
    """Interconnect between machines, a key of `INTERCONNECTS`; one adapter per device."""

    @property
    def num_ranks(self) -> int:
        return self.num_devices * self.num_nodes

    @property
    def is_cpu(self) -> bool:
        return self.device.name == CPU

    @property
    def link_bytes_per_s(self) -> float:
        """Bandwidth of the slowest link between two ranks, in one direction."""
        if self.num_nodes == 1:
            return self.device.link_bytes_per_s
        return min(self.device.link_bytes_per_s, INTERCONNECTS[self.interconnect])


def find_cluster(device: str, num_devices: int, num_nodes: int = 1, interconnect: str | None = None) -> Cluster:
    """The cluster of `num_nodes` machines with `num_devices` devices each.

    Args:
        device: a key of `DEVICES`, or "cpu" for this machine.
        interconnect: a key of `INTERCONNECTS`; None: infiniband-hdr if there are several machines.

    Raises:
        UserError: unknown device or interconnect, or several machines with the interconnect "none".
    """
    if device != CPU and device not in DEVICES:
        known = [*DEVICES, CPU]
        raise UserError(f"--device: found {device!r}, allowed: {', '.join(known)}{nearest(device, known)}")
    for name, value in (("--devices-per-node", num_devices), ("--nodes", num_nodes)):
        if value < 1:
            raise UserError(f"{name}: found {value}, allowed: 1 or more")
    link = interconnect or ("none" if num_nodes == 1 else "infiniband-hdr")
    if link not in INTERCONNECTS:
        known = list(INTERCONNECTS)
        raise UserError(f"--interconnect: found {link!r}, allowed: {', '.join(known)}{nearest(link, known)}")
    if num_nodes > 1 and not INTERCONNECTS[link]:
        raise UserError(f"--interconnect: none, but --nodes is {num_nodes}; name what connects them")
    return Cluster(DEVICES.get(device) or _this_cpu(num_devices), num_devices, num_nodes, link)


def _this_cpu(num_ranks: int) -> Device:
    """One rank's share of this machine. The numbers for its speed are rough; plans use a measurement instead."""
    return Device(CPU, "", psutil.virtual_memory().total / num_ranks, 10e9, 5e9, 65 / num_ranks, (0.01, 0.05))
