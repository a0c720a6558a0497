"""The project's programs, run in forks of one Python that has imported what they import.

Starting a program costs seconds, nearly all of them imports. A fork has them, and is otherwise a
process as a user starts it: its own arguments, environment, standard streams and exit code. (JAX
starts its backend, which does not survive a fork, when it is first used: in the fork.)
"""

import multiprocessing
import os
import pathlib
import runpy
import sys
import tempfile

_IMPORTS = (
    "PIL.JpegImagePlugin",
    "importlib_resources",
    "ml_collections.config_flags",
    "protoseg_jax.program",
    "protoseg_jax.training.run",  # no module of cli: each defines flags of its own
    "protoseg_jax.data.sets.folder",
    "protoseg_jax.data.sets.isbi_em",
    "protoseg_jax.evaluation.score",
    "protoseg_jax.explain.page",
    "protoseg_jax.explain.figures",
    "protoseg_jax.training.removal",
)
_PROGRAMS = multiprocessing.get_context("forkserver")
_PROGRAMS.set_forkserver_preload([*_IMPORTS])


def run(line: list[str], environment: dict[str, str], cwd: pathlib.Path) -> tuple[int, str]:
    """(exit code, stderr) of a program: [python, SCRIPT or "-m", MODULE, *arguments].

    What JAX reads of its environment when it is imported is that of the first call in a process.
    """
    with tempfile.NamedTemporaryFile() as file:
        process = _PROGRAMS.Process(target=_program, args=(line[1:], environment, cwd, file.name))
        process.start()
        process.join()
        return process.exitcode, pathlib.Path(file.name).read_text()


def _program(line: list[str], environment: dict[str, str], cwd: pathlib.Path, errors: str) -> None:
    """What the fork does."""
    for stream, name in ((0, os.devnull), (1, os.devnull), (2, errors)):
        os.dup2(os.open(name, os.O_RDONLY if stream == 0 else os.O_WRONLY), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if line[0] == "-m":
        sys.argv, sys.path[0] = line[1:], os.fspath(cwd)
        runpy.run_module(line[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = line, os.path.dirname(line[0])
        runpy.run_path(line[0], run_name="__main__")
