"""What is found by name: backbones, data sets, loss terms, measures; the package's own or anyone's.

Each is one module. A name without a dot is a file of the package; a dotted one is a module anywhere
on Python's path, to which every program adds the current directory (`program.run`).
"""

import importlib
import os
import pkgutil
import types
from collections.abc import Sequence

from protoseg_jax.errors import UserError, one_line


def find(kind: str, name: str | None, package: str, needs: Sequence[str]) -> types.ModuleType:
    """The module that a config names.

    Args:
      kind: the config's key, for messages.
      name: `resnet`, say, or `mypackage.mynet`.
      package: where the package's own are, below `protoseg_jax`.
      needs: names that the module must define.

    Raises:
      UserError: none is named, there is no such module, it does not import, or it lacks a need.
    """
    name = name or ""
    full = name if "." in name else f"protoseg_jax.{package}.{name}"
    try:
        module = importlib.import_module(full)
    except ModuleNotFoundError as error:
        if not f"{full}.".startswith(f"{error.name}."):
            raise UserError(f"{kind}={name!r} does not import ({one_line(error)})") from error
        known = ", ".join(known_names(package, needs))
        where = (
            f"there is no such module in {os.getcwd()} or among the installed ones"
            if "." in name
            else "a module of yours has a dot in its name: mine/net.py is mine.net"
        )
        raise UserError(f"{kind}={name!r} is unknown; choose one of {known}; {where}") from error
    except Exception as error:  # whatever a file of the user's does
        raise UserError(
            f"{kind}={name!r} does not import ({type(error).__name__}: {one_line(error)})"
        ) from error
    for need in needs:
        if not hasattr(module, need):
            raise UserError(f"{kind}={name!r} ({module.__file__}) has no {need!r}; define it there")
    return module


def known_names(package: str, needs: Sequence[str]) -> list[str]:
    """Names of the package's own modules that define all of `needs`."""
    home = importlib.import_module(f"protoseg_jax.{package}")
    names = [m.name for m in pkgutil.iter_modules(home.__path__)]
    modules = {n: importlib.import_module(f"{home.__name__}.{n}") for n in names}
    return [n for n, module in modules.items() if all(hasattr(module, need) for need in needs)]
