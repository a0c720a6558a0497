"""What would make scores too good: an image that trains and is also scored."""

import hashlib

import numpy as np
from jaxtyping import UInt8

from protoseg_jax.errors import UserError

_SCORED = ("validation", "test")  # all other splits train, or are where prototypes come from


class Leaks:
    """Looks at every image of a data set, in the order in which they are prepared."""

    def __init__(self):
        self._names: set[tuple[str, str]] = set()
        # Of splits that are not scored, and of those that are: name or digest → (split, name).
        self._seen: tuple[dict[str | bytes, tuple[str, str]], ...] = {}, {}

    def add(self, split: str, name: str, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        """Take an image in.

        Raises:
          UserError: the split has one of that name already; or a split of the other kind has one of
            that name, or with the same pixels.
        """
        if (split, name) in self._names:
            raise UserError(
                f"image {name!r} is in split {split!r} twice; list it once, or rename one if they "
                "are two"
            )
        self._names.add((split, name))
        digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(pixels))
        scored = split in _SCORED
        for key, what in ((name, "name"), (digest.digest(), "pixels")):
            if key in self._seen[not scored]:
                other, twin = self._seen[not scored][key]
                rename = ", or rename it if they are two" if what == "name" else ""
                raise UserError(
                    f"image {name!r} of split {split!r} has the {what} of image {twin!r} of split "
                    f"{other!r}, and a score on what trained is too good; take one out{rename}"
                )
            self._seen[scored].setdefault(key, (split, name))
