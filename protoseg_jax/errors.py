"""User errors: what the user must change, in one line; `program` turns it into exit code 2."""

import errno


class UserError(Exception):
    """Something the user must change. The message is one line: what, where, what to do."""


class Fault(UserError):
    """What is wrong with one file of many, so that all faults can be told at once.

    Attributes:
      kind: a few words for all of its kind, to be counted by.
      fact: what is wrong, with the file's name.
      remedy: what to do; the message is "fact; remedy".
    """

    def __init__(self, kind: str, fact: str, remedy: str):
        super().__init__(f"{fact}; {remedy}")
        self.kind, self.fact, self.remedy = kind, fact, remedy


def full_disk(error: BaseException) -> bool:
    """Whether an exception means that the disk (or the quota) is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("No space left", "Disk quota exceeded"))


def reason(error: BaseException) -> str:
    """Why, in a few words, for a `UserError` about what another exception met."""
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__


def one_line(error: BaseException) -> str:
    """An exception's text as one line; of a traceback within it, the last line."""
    text = str(error)
    if "Traceback (most recent call last)" in text:  # ml_collections, of an error in a config file
        text = text.strip().splitlines()[-1]
    return printable(" ".join(text.split()) or type(error).__name__)


def printable(text: str) -> str:
    """Text of which every terminal can show each character; names of files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
