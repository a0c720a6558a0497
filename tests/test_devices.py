"""Compiled programs are kept, and the second start reads them."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp
from protoseg_jax import devices

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
devices.keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8))).block_until_ready()
print(sum(name.endswith("cache_hits") for name in hits))
"""


def start(**variables):
    names = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**environment, **{k: str(v) for k, v in variables.items()}},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


def test_a_second_start_reads_what_the_first_compiled(tmp_path):
    assert start(XDG_CACHE_HOME=tmp_path) == 0
    (folder,) = (tmp_path / "protoseg_jax").iterdir()
    assert any(folder.iterdir())
    assert start(XDG_CACHE_HOME=tmp_path) > 0


def test_the_user_s_own_folder_is_respected(tmp_path):
    start(JAX_COMPILATION_CACHE_DIR=tmp_path / "own", XDG_CACHE_HOME=tmp_path / "other")
    assert any((tmp_path / "own").iterdir()) and not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_written_is_no_bother(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert start(XDG_CACHE_HOME=tmp_path / "file") == 0
