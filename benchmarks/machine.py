"""What a benchmark ran on, in words; its page."""

import datetime
import pathlib
import platform

import jax

from protoseg_jax import devices


def cpu() -> str:
    """The processor's name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def report(lines: list[str], out: pathlib.Path | None) -> None:
    """Print a page, and write it to a file if one is named."""
    text = "\n".join(lines) + "\n"
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


def describe() -> str:
    """Date, processor and cores, accelerator if there is one, and versions: one sentence each."""
    local = jax.local_devices()
    on_cpu = local[0].platform == "cpu"
    accelerator = "" if on_cpu else f" {len(local)} × {local[0].device_kind}."
    count = f"{devices.cores()} core{'s' if devices.cores() > 1 else ''}"
    return (
        f"{datetime.date.today()}. CPU: {cpu()}, {count}.{accelerator} "
        f"JAX {jax.__version__}, Python {platform.python_version()}."
    )
