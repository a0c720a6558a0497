"""Devices: pmap, replication, sharding and prefetching. The only file that knows about devices.

Every parallel computation of the project is a `jax.pmap` over the axis `AXIS`. Batches travel as
NumPy arrays of shape [B, ...] and are split into [n, B/n, ...] here and nowhere else.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from protoseg_jax.errors import UserError

AXIS = "devices"


def psum(tree: Any) -> Any:
    """Sum over the devices, inside a function mapped by `DevicePool.map`."""
    return jax.lax.psum(tree, AXIS)


class DevicePool:
    """The local devices that one computation runs on.

    Args:
      devices: the devices to use; all local ones by default.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        self.devices = list(devices or jax.local_devices())
        mesh = jax.sharding.Mesh(np.array(self.devices), (AXIS,))
        self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))

    @property
    def count(self) -> int:
        """Number of devices."""
        return len(self.devices)

    def map(self, function: Callable, donate_argnums: tuple[int, ...] = ()) -> Callable:
        """`jax.pmap` of `function` over these devices along `AXIS`."""
        return jax.pmap(
            function, axis_name=AXIS, devices=self.devices, donate_argnums=donate_argnums
        )

    def replicate(self, tree: Any) -> Any:
        """One copy of every array on each device: [...] → [n, ...]."""
        return jax.tree.map(
            lambda x: jax.device_put(np.stack([np.asarray(x)] * self.count), self._sharding), tree
        )

    def first(self, tree: Any) -> Any:
        """The first device's copy of a replicated tree, as NumPy arrays."""
        return jax.device_get(jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree))

    def all(self, tree: Any) -> Any:
        """All devices' values as NumPy arrays, [n, ...]."""
        return jax.device_get(tree)

    def check_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Refuse a global batch that does not split evenly over devices and micro-batches.

        Raises:
          UserError: `batch_size` is not a positive multiple of devices · `accumulate`.
        """
        if accumulate < 1:
            raise UserError(f"accumulate={accumulate} must be at least 1; set --config.accumulate")
        parts = self.count * accumulate
        if batch_size <= 0 or batch_size % parts:
            raise UserError(
                f"batch_size={batch_size} does not divide into {self.count} device(s) × "
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
