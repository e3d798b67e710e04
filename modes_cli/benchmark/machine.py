"""What this machine can do at most, measured in the same run as the cases that are held against it."""

import platform
from pathlib import Path

import torch

from modes_cli.artifacts.bench import Machine
from modes_cli.timing import copy_rate, product_rate, read_rate

# Side of the square matrices whose product gives the peak, and bytes that are moved for the bandwidth; far more than a
# cache holds. A GPU is only busy with more of both.
SIDE = {"cpu": 1024, "cuda": 8192}
SIZE = {"cpu": 256 << 20, "cuda": 4 << 30}


def measure_machine(device: torch.device, dtype: torch.dtype = torch.float32) -> Machine:
    """Best matmul rate in `dtype` and best memory rate, over a few tries, with torch's current threads.

    A GPU's memory rate is that of reading or of copying, whichever is higher: torch's sum does not always reach it.
    """
    side, size = SIDE[device.type], SIZE[device.type]
    bandwidth = read_rate(size, device)
    if device.type == "cuda":
        bandwidth = max(bandwidth, copy_rate(size // 2, device))
    return Machine(
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        peak_flops=product_rate(side, side, side, device, dtype),
        read_bandwidth=bandwidth,
    )


def cpu_name() -> str:
    """As the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
