"""Devices and processes: pmap, replication, sharding, prefetching. The only file that knows them.

Every parallel computation of the project is a `jax.pmap` over the axis `AXIS`, which spans the
devices of all processes. Batches travel as NumPy arrays of shape [B, ...], the part of this
process, and are split into [n, B/n, ...] here and nowhere else.
"""

import collections
import contextlib
import ctypes
import hashlib
import itertools
import os
import pathlib
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from protoseg_jax.errors import UserError, reason

AXIS = "devices"
_PEER_TIMEOUT = 30  # seconds without a sign of life after which a peer counts as dead
_COMPILED_BYTES = 2 << 30  # of compiled programs that are kept
_JOIN_TIMEOUT = 120  # seconds to wait for all processes at the start
_PROCESSES = [f"JAX_{n}" for n in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")]
# Of mallopt(3): no block from the system alone, nothing trimmed from the heap, one heap.
_MALLOC = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}
_CPU_DEVICES = "--xla_force_host_platform_device_count"


def start_processes() -> None:
    """Join the other processes of a run, where the environment says that there are some.

    `JAX_COORDINATOR_ADDRESS=host:port`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or what
    `jax.distributed` detects by itself (SLURM with more than one task, Open MPI). To be called
    before anything else uses JAX. A peer that dies ends this process with a message within a
    minute.

    Raises:
      UserError: the variables are incomplete or wrong, or the others cannot be reached.
    """
    environment, named = os.environ, _PROCESSES
    given = [n for n in named if environment.get(n)]
    if not _several_processes():
        return
    if given and len(given) < len(named):
        missing = ", ".join(n for n in named if n not in given)
        raise UserError(f"{given[0]} is set but {missing} is not; set all of them, or none")
    arguments = {}
    if given:
        try:
            arguments = {
                "coordinator_address": environment[named[0]],
                "num_processes": int(environment[named[1]]),
                "process_id": int(environment[named[2]]),
            }
        except ValueError as error:
            raise UserError(f"{named[1]} and {named[2]} must be whole numbers: {error}") from error
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=_JOIN_TIMEOUT,
            heartbeat_timeout_seconds=_PEER_TIMEOUT,
            shutdown_timeout_seconds=_PEER_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run did not find each other ({reason(error)}); see that all "
            "were started, with the same coordinator address and each with its own number"
        ) from error


def _several_processes() -> bool:
    """Whether the environment says that this is one process of several."""
    several = any(os.environ.get(n) for n in _PROCESSES)
    several |= int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    return several or "OMPI_MCA_orte_hnp_uri" in os.environ


def cores() -> int:
    """CPU cores that this process may use, by its affinity and by its control group's quota."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return count


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, in one heap, where this process has glibc.

    A program on a CPU frees its maps at every step. glibc gives large blocks back to the system,
    which fills them with zeros when they are wanted again: a fifth of the time of a step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for parameter, value in _MALLOC.values():
        mallopt(parameter, value)


def give_back_freed_memory() -> None:
    """Let glibc give back what is freed by now: after work on images of all sizes its heap has
    holes that nothing else fits."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def split_cpu(
    wanted: int | None = None,
    *,
    before: int | None = None,
    batch_size: int = 0,
    accumulate: int = 1,
) -> None:
    """Make a CPU so many devices, before JAX starts; GPUs are as many as there are.

    XLA spreads a convolution over cores, but not what is between two, so that one device leaves
    cores idle. How many: what is wanted; else what XLA_FLAGS says; else as before; else one a core,
    as far as a batch divides. Of several processes each brings one.

    Args:
      wanted: how many.
      before: how many a run had that goes on; with another number it ends a rounding error away
        from where it would have ended.
      batch_size, accumulate: what must divide, see `DevicePool.check_batch`; 0 for nothing.

    Raises:
      UserError: `wanted` is below 1.
    """
    if wanted is not None and wanted < 1:
        raise UserError(f"--devices={wanted} must be at least 1")
    flags = os.environ.get("XLA_FLAGS", "")
    if wanted is None:
        if _CPU_DEVICES in flags or _several_processes():
            return
        parts = range(cores(), 0, -1)
        most = next((n for n in parts if batch_size % (n * max(accumulate, 1)) == 0), 1)
        wanted = before or most
    others = re.sub(rf"{_CPU_DEVICES}=\S*", "", flags).strip()
    os.environ["XLA_FLAGS"] = f"{others} {_CPU_DEVICES}={wanted}".strip()


def keep_compiled_programs() -> None:
    """Keep XLA's compiled programs, so that a run that goes on does not compile again.

    Where `JAX_COMPILATION_CACHE_DIR` says, else in `protoseg_jax/xla-…` of the user's cache folder
    (`XDG_CACHE_HOME`, `~/.cache`), a folder for each kind of CPU: XLA's code for one may crash on
    another. Does nothing where that cannot be written.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    try:
        with open("/proc/cpuinfo") as file:
            features = next((line for line in file if line.startswith(("flags", "Features"))), "")
        kind = hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()[:12]
        folder = os.path.join(base, "protoseg_jax", f"xla-{platform.machine()}-{kind}")
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_compilation_cache_max_size", _COMPILED_BYTES)


def leave_processes(error: BaseException) -> None:
    """End this process when its peers are still at work: waiting for them would be for ever.

    Does nothing where there are no peers.
    """
    if jax.process_count() > 1:
        if not isinstance(error, UserError):
            traceback.print_exception(error)
        print(f"process {jax.process_index()} ends: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2 if isinstance(error, UserError) else 1)


def is_main() -> bool:
    """Whether this process writes files and speaks: the first one."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def on_any_process(value: int) -> int:
    """The largest value over the processes; all of them must call this at the same place."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def psum(tree: Any) -> Any:
    """Sum over the devices, inside a function mapped by `DevicePool.map`."""
    return jax.lax.psum(tree, AXIS)


def pmax(tree: Any) -> Any:
    """The largest over the devices, inside a function mapped by `DevicePool.map`."""
    return jax.lax.pmax(tree, AXIS)


class DevicePool:
    """The devices that one computation runs on.

    Args:
      devices: the devices to use, of one process; by default all of every process.

    Attributes:
      devices: those of this process.
      processes: how many processes share the work.
      process: the number of this one.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        self.devices = list(devices or jax.local_devices())
        self.processes = 1 if devices else jax.process_count()
        self.process = 0 if devices else jax.process_index()
        mesh = jax.sharding.Mesh(np.array(self.devices), (AXIS,))
        self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))

    @property
    def count(self) -> int:
        """Number of this process's devices."""
        return len(self.devices)

    @property
    def total(self) -> int:
        """Number of devices of all processes."""
        return self.count * self.processes

    def map(self, function: Callable, donate_argnums: tuple[int, ...] = ()) -> Callable:
        """`jax.pmap` of `function` over these devices along `AXIS`."""
        devices = self.devices if self.processes == 1 else None
        return jax.pmap(function, axis_name=AXIS, devices=devices, donate_argnums=donate_argnums)

    def replicate(self, tree: Any) -> Any:
        """One copy of every array on each device: [...] → [n, ...]."""

        def put(x):
            x = np.asarray(x)[None]
            copies = [jax.device_put(x, device) for device in self.devices]
            shape = (self.count, *x.shape[1:])
            return jax.make_array_from_single_device_arrays(shape, self._sharding, copies)

        return jax.tree.map(put, tree)

    def first(self, tree: Any) -> Any:
        """The first device's copy of a replicated tree, as NumPy arrays."""
        return jax.device_get(jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree))

    def all(self, tree: Any) -> Any:
        """All devices' values, of all processes, as NumPy arrays: [total, ...]."""
        tree = jax.device_get(tree)
        if self.processes == 1:
            return tree
        gathered = multihost_utils.process_allgather(tree)
        return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), gathered)

    def check_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Refuse a global batch that does not split evenly over devices and micro-batches.

        Raises:
          UserError: `batch_size` is not a positive multiple of devices · `accumulate`.
        """
        if accumulate < 1:
            raise UserError(f"accumulate={accumulate} must be at least 1; set --config.accumulate")
        parts = self.total * accumulate
        if batch_size <= 0 or batch_size % parts:
            raise UserError(
                f"batch_size={batch_size} does not divide into {self.total} device(s) × "
                f"accumulate={accumulate}; set --config.batch_size to a multiple of {parts}"
            )

    def shard(self, batch: Any) -> Any:
        """Split the leading axis of every array over the devices: [B, ...] → [n, B/n, ...]."""

        def put(x):
            x = np.asarray(x)
            return jax.device_put(x.reshape(self.count, -1, *x.shape[1:]), self._sharding)

        return jax.tree.map(put, batch)

    def prefetch(self, batches: Iterable[Any], size: int = 2) -> Iterator[Any]:
        """Shard batches onto the devices, `size` of them ahead of their use.

        Transfers are asynchronous, so the next batches travel while the current one is computed.
        """
        iterator, queue = iter(batches), collections.deque()
        queue.extend(self.shard(b) for b in itertools.islice(iterator, size))
        while queue:
            yield queue.popleft()
            queue.extend(self.shard(b) for b in itertools.islice(iterator, 1))

    def outputs(
        self, step: Callable, variables: Any, batches: Iterable[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """One pass of step(variables, batch) over a split: each batch and what came out.

        Args:
          step: to be mapped over the devices.
          variables: the model's (unreplicated).
          batches: NumPy trees of this process.

        Yields:
          (the batch as it came, the step's result, still on the devices: [n, ...]).
        """
        step, variables = self.map(step), self.replicate(variables)
        host, ahead = itertools.tee(batches)
        for batch, placed in zip(host, self.prefetch(ahead), strict=True):
            yield batch, step(variables, placed)


def total(*parts: np.ndarray) -> np.ndarray:
    """The sum of arrays in 64 bits: integers as int64, floats as float64."""
    return np.sum(parts, axis=0, dtype=np.result_type(parts[0], np.int64))


def stack_metrics(metrics: Sequence[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over steps of replicated scalar metrics, fetched in one transfer.

    Args:
      metrics: one dict of arrays of shape [n] (equal on every device) per step.
    """
    rows = jax.device_get(
        [{k: v.addressable_shards[0].data for k, v in m.items()} for m in metrics]
    )
    return {k: float(np.mean([np.asarray(row[k]).reshape(-1)[0] for row in rows])) for k in rows[0]}


def backend_description() -> dict[str, Any]:
    """What the computation runs on, for a run's manifest."""
    devices = jax.local_devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "local_devices": len(devices),
        "processes": jax.process_count(),
        "jax": jax.__version__,
    }
