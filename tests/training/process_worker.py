"""One of several processes: the first gradients of test_step's batch, to an .npz by the first.

JAX_COORDINATOR_ADDRESS=… JAX_NUM_PROCESSES=… JAX_PROCESS_ID=… python process_worker.py OUT
"""

import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from protoseg_jax import devices  # noqa: E402

if __name__ == "__main__":
    devices.start_processes()
    import test_step

    pool = devices.DevicePool()
    part = {k: v[pool.process :: pool.processes] for k, v in test_step.make_batch().items()}
    state, metrics = test_step.run_on(pool, "joint", batch=part)
    if devices.is_main():
        np.savez(sys.argv[1], *test_step.first_gradient(state), loss=metrics["loss"])
    devices.barrier("done")
