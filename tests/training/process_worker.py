"""One of several processes: test_step's first gradients, and the parameters after its SGD steps.

The first process writes them to an .npz.

JAX_COORDINATOR_ADDRESS=… … python -m tests.training.process_worker OUT
"""

import sys

import jax
import numpy as np

from protoseg_jax import devices

if __name__ == "__main__":
    devices.start_processes()
    from tests.training import test_step

    pool = devices.DevicePool()
    part = {k: v[pool.process :: pool.processes] for k, v in test_step.make_batch().items()}
    state, metrics = test_step.run_on(pool, "joint", batch=part)
    learnt = {
        f"sgd{jax.tree_util.keystr(path)}": x
        for path, x in jax.tree_util.tree_leaves_with_path(test_step.sgd_on(pool, part))
    }
    if devices.is_main():
        gradient = {f"gradient_{n}": x for n, x in enumerate(test_step.first_gradient(state))}
        np.savez(sys.argv[1], loss=metrics["loss"], **gradient, **learnt)
    devices.barrier("done")
