"""What a benchmark ran on, in words; its page."""

import datetime
import os
import pathlib
import platform

import jax


def cpu() -> str:
    """The processor's name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def report(lines: list[str], out: pathlib.Path | None) -> None:
    """Print a page, and write it to a file if one is named."""
    text = "\n".join(lines) + "\n"
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


def describe() -> str:
    """Date, processor and cores, accelerator if there is one, and versions: one sentence each."""
    devices = jax.local_devices()
    on_cpu = devices[0].platform == "cpu"
    accelerator = "" if on_cpu else f" {len(devices)} × {devices[0].device_kind}."
    count = f"{cores()} core{'s' if cores() > 1 else ''}"
    return (
        f"{datetime.date.today()}. CPU: {cpu()}, {count}.{accelerator} "
        f"JAX {jax.__version__}, Python {platform.python_version()}."
    )
