"""User errors: the one exception for them, and the one place where it becomes exit code 2.

Exit codes of every program (the contract of the command line): 0 done; 2 the user must change
something; 143/130 saved after SIGTERM/Ctrl-C; 1 a bug, with its traceback.
"""

import errno
import functools
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from etils import epath

from protoseg_jax.interrupts import Interrupted


class UserError(Exception):
    """Something the user must change. The message is one line: what, where, what to do."""


def full_disk(error: BaseException) -> bool:
    """Whether an exception means that the disk (or the quota) is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("No space left", "Disk quota exceeded"))


def reason(error: BaseException) -> str:
    """Why, in a few words, for a `UserError` about what another exception met."""
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0][:120] if text else type(error).__name__


def _one_line(error: BaseException) -> str:
    text = str(error)
    if "Traceback (most recent call last)" in text:  # ml_collections, of an error in a config file
        text = text.strip().splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__


def exit_with(message: str) -> None:
    """Print one line on stderr and exit with code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def require_config_file(argv: Sequence[str], flag: str = "config") -> None:
    """Refuse a `--config` that names no file (ml_collections would read it as an empty config).

    Raises:
      UserError: the file does not exist or is a folder.
    """
    for position, argument in enumerate(argv):
        name, separator, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == flag:
            if not separator:
                value = argv[position + 1] if position + 1 < len(argv) else ""
            path = value.partition(":")[0]
            if not epath.Path(path).is_file():
                raise UserError(
                    f"config file {path!r} does not exist; configs/ holds the ready ones"
                )


def _parse_flags(argv: Sequence[str], arguments: Sequence[str]) -> list[str]:
    if any(a in ("--help", "-h", "-help", "--helpfull", "-helpfull") for a in argv[1:]):
        return app.parse_flags_with_usage(list(argv))
    try:
        require_config_file(argv)
        rest = flags.FLAGS(list(argv))
    except UserError as error:
        exit_with(_one_line(error))
    # A bad value surfaces as flags.Error, a misspelt config key as AttributeError or KeyError.
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError) as error:
        exit_with(f"command line: {_one_line(error)}")
    if len(rest) - 1 > len(arguments):
        unexpected = rest[1 + len(arguments)]
        exit_with(f"command line: unexpected argument {unexpected!r}; flags are --name=value")
    if len(rest) - 1 < len(arguments):
        exit_with(f"command line: {' '.join(arguments[len(rest) - 1 :])} missing")
    return rest


def run(main: Callable[..., None], arguments: Sequence[str] = ()) -> None:
    """Parse absl flags, run `main`; a `UserError` or bad flag ends with one line and code 2.

    Args:
      main: called with the arguments that are no flags.
      arguments: their names.
    """

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax and TFDS tell every step they take
        try:
            main(*argv[1:])
        except UserError as error:
            exit_with(_one_line(error))
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

    app.run(guarded, flags_parser=functools.partial(_parse_flags, arguments=arguments))
