"""What would make scores too good: an image that trains and is also scored."""

import hashlib

import numpy as np
from jaxtyping import UInt8

from protoseg_jax.errors import UserError
from protoseg_jax.progress import say

_SCORED = ("validation", "test")  # all other splits train, or are where prototypes come from


class Leaks:
    """Looks at every image of a data set, in the order in which they are prepared.

    Args:
      official: whether its splits are a benchmark's, which nobody can mend: pixels that two of them
        share are then told, not refused.
    """

    def __init__(self, official: bool = False):
        self._official = official
        self._names: set[tuple[str, str]] = set()
        # Of splits that are not scored, and of those that are: name or digest → (split, name).
        self._seen: tuple[dict[str | bytes, tuple[str, str]], ...] = {}, {}

    def add(self, split: str, name: str, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        """Take an image in.

        Raises:
          UserError: the split has one of that name already; or a split of the other kind has one of
            that name, or with the same pixels and is no benchmark's.
        """
        if (split, name) in self._names:
            raise UserError(
                f"image {name!r} is in split {split!r} twice; leave one out, or rename one"
            )
        self._names.add((split, name))
        digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(pixels))
        key, scored = digest.digest(), split in _SCORED
        same_name, same_pixels = (self._seen[not scored].get(k) for k in (name, key))
        if same_name or same_pixels:
            other, twin = same_name or same_pixels
            if same_name and same_pixels:
                what, advice = f"is in split {other!r} too", "take it out of one"
            elif same_name:
                what, advice = (
                    f"has the name of one of split {other!r}",
                    "rename one, or take it out",
                )
            else:
                what, advice = f"has the pixels of {twin!r} of split {other!r}", "take one out"
            text = (
                f"image {name!r} of split {split!r} {what}, and a score on what trained is too good"
            )
            if not (self._official and same_name is None):
                raise UserError(f"{text}; {advice}")
            say(f"warning: {text}")
        for found in (name, key):
            self._seen[scored].setdefault(found, (split, name))
