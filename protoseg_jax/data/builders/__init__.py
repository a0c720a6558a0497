"""Data sets as TFDS builders, one file each; `load` prepares one and gives access to it."""

import os

import ml_collections

from protoseg_jax.data.builders.base import SegmentationData, Source
from protoseg_jax.data.builders.camvid import CamVid
from protoseg_jax.data.builders.cityscapes import Cityscapes
from protoseg_jax.data.builders.folder import Folder
from protoseg_jax.data.builders.isbi_em import IsbiEm
from protoseg_jax.data.builders.voc import Voc
from protoseg_jax.data.label_sets import VOID
from protoseg_jax.errors import UserError

__all__ = ["SegmentationData", "Source", "from_config", "load"]

_FIXED = {"camvid": CamVid, "voc": Voc, "cityscapes": Cityscapes}
_NAMES = ("parts", *_FIXED, "isbi_em", "folder")


def from_config(config: ml_collections.ConfigDict) -> SegmentationData:
    """The data set of a run's config.

    Raises:
      UserError: see `load`.
    """
    return load(
        config.data.name,
        data_dir=config.data.dir,
        cache_dir=config.data.cache,
        seed=config.seed,
        void=config.data.get("void"),
    )


def load(
    name: str,
    *,
    data_dir: str | None,
    cache_dir: str | os.PathLike,
    seed: int,
    void: int | None = None,
) -> SegmentationData:
    """A data set, prepared in the cache on first use.

    Args:
      name: parts, camvid, voc, cityscapes, isbi_em or folder.
      data_dir: where its files lie (not used by parts).
      cache_dir: where prepared data sets are kept.
      seed: of what is generated (parts) or drawn (the splits of isbi_em and folder).
      void: folder's mask value for "no label"; 255 by default.

    Raises:
      UserError: unknown name, or data that is missing or wrong.
    """
    if name not in _NAMES:
        raise UserError(f"data.name={name!r} is unknown; choose one of {', '.join(_NAMES)}")
    if name != "parts" and not data_dir:
        raise UserError(f"data set {name!r} needs its folder; set --config.data.dir=PATH")
    if name == "parts":
        # Here, because `python -m protoseg_jax.data.builders.parts` must be the first to import it.
        from protoseg_jax.data.builders.parts import Parts

        builder = Parts(cache_dir=cache_dir, seed=seed)
    elif name in _FIXED:
        builder = _FIXED[name](cache_dir=cache_dir, data_dir=data_dir)
    elif name == "isbi_em":
        builder = IsbiEm(cache_dir=cache_dir, data_dir=data_dir, seed=seed)
    else:
        builder = Folder(
            cache_dir=cache_dir, data_dir=data_dir, seed=seed, void=VOID if void is None else void
        )
    builder.prepare()
    return SegmentationData(builder)
