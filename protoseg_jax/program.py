"""A program: its flags, its exit codes, and the signals that stop it.

Exit codes (the contract of the command line): 0 done; 2 the user must change something, said in one
line on stderr; 143/130 saved after SIGTERM/Ctrl-C; 1 a bug, with its traceback.
"""

import contextlib
import functools
import os
import re
import signal
import sys
import types
from collections.abc import Iterator, Sequence

from absl import app, flags, logging

from protoseg_jax import config
from protoseg_jax.errors import UserError, full_disk, one_line

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """The run was asked to stop, and what it had is saved.

    Attributes:
      code: the exit code, 128 + the signal's number.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.code = 128 + signum


class Interrupts:
    """Catches SIGTERM and SIGINT while it is entered.

    Outside `held()` a signal raises `Interrupted` where it strikes; inside, it is kept in
    `pending` for the loop to look at between two steps. A second signal kills at once.
    """

    def __init__(self):
        self.pending = 0
        self._held = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupts":
        self._previous = {s: signal.signal(s, self._handle) for s in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: object) -> None:
        if self.pending:
            os._exit(128 + signum)
        self.pending = signum
        if not self._held:
            raise Interrupted(signum)
        text = f"{signal.Signals(signum).name}: saving after this step; again to stop at once"
        print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A stretch that signals do not cut; what struck inside is raised at its end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.pending and not self._held:
            raise Interrupted(self.pending)


def exit_with(message: str) -> None:
    """Print one line on stderr and exit with code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def _with_config(argv: Sequence[str]) -> list[str]:
    """The arguments, the file of `--config` found (ml_collections reads none as empty)."""
    found = list(argv)
    for n, argument in enumerate(found):
        if argument in ("--config", "-config"):
            found[n + 1 : n + 2] = [config.find("".join(found[n + 1 : n + 2]))]
        elif argument.startswith(("--config=", "-config=")):
            flag, _, value = argument.partition("=")
            found[n] = f"{flag}={config.find(value)}"
    return found


def _usage(module: types.ModuleType) -> str:
    """A module's docstring and its flags, for one screen."""
    lines = [(module.__doc__ or "").strip(), "", "flags:"]
    for flag in flags.FLAGS.get_key_flags_for_module(module.__name__):
        plain = isinstance(flag.default, str | int | float | list) and flag.default not in (
            False,
            [],
        )
        default = f" (default {flag.default})" if plain else ""
        lines.append(f"  --{flag.name:<18} {flag.help}{default}")
    return "\n".join(lines)


def _parse(argv: Sequence[str], module: types.ModuleType) -> list[str]:
    if {"--help", "-h", "-help", "--helpfull", "-helpfull"} & set(argv[1:]):
        print(_usage(module))
        sys.exit(0)
    ready = getattr(module, "CONFIG", None)
    if ready and not any(a.lstrip("-").split("=")[0] == "config" for a in argv[1:]):
        argv = [argv[0], f"--config={ready}", *argv[1:]]
    try:
        rest = flags.FLAGS(_with_config(argv))
    except UserError as error:
        exit_with(one_line(error))
    # A bad value surfaces as flags.Error, a misspelt config key as AttributeError or KeyError.
    except (AttributeError, KeyError) as error:
        found = re.search(r"'(\w+)\\*'(?:.*Did you mean \"(\w+)\")?", str(error), re.DOTALL)
        near = f"; did you mean {found[2]!r}?" if found and found[2] else ""
        told = f"there is no key {found[1]!r}{near}" if found else one_line(error)
        exit_with(f"command line: {told}")
    except (flags.Error, ValueError, TypeError) as error:
        exit_with(f"command line: {one_line(error)}")
    wanted = getattr(module, "ARGUMENTS", ())
    several = bool(wanted) and wanted[-1].rstrip("]").endswith("…")
    needed = [name for name in wanted if not name.startswith("[")]
    if len(rest) - 1 > len(wanted) and not several:
        unexpected = rest[1 + len(wanted)]
        exit_with(f"command line: unexpected argument {unexpected!r}; flags are --name=value")
    if len(rest) - 1 < len(needed):
        exit_with(f"command line: {' '.join(needed[len(rest) - 1 :])} missing")
    return rest


def run(module: types.ModuleType, argv: Sequence[str]) -> None:
    """Run a module's `main` as a program: flags, one line for what the user must change.

    Args:
      module: it has defined its absl flags; its docstring is the help; `main` is called with the
        arguments that are no flags, named by `ARGUMENTS` ("NAME …", last: one or more; "[NAME]":
        it may be left out); `CONFIG`: the ready config where `--config` names none.
      argv: the program's name and arguments.
    """
    sys.path.append(os.getcwd())  # for what a config names by a dotted path

    def guarded(rest: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax and TFDS tell every step they take
        try:
            module.main(*rest[1:])
        except UserError as error:
            exit_with(one_line(error))
        except Interrupted as error:
            print(f"{error}; the same command goes on", file=sys.stderr, flush=True)
            sys.exit(error.code)
        except Exception as error:
            if not full_disk(error):
                raise
            place = getattr(error, "filename", None) or "the run's folder"
            exit_with(
                f"the disk is full: {place} could not be written; make room and start the same "
                "command again, it goes on from the last checkpoint"
            )

    app.run(guarded, argv=list(argv), flags_parser=functools.partial(_parse, module=module))
