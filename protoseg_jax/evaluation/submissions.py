"""Predicted labels as files, in a benchmark's submission format where the data set has one.

* `voc`: `results/VOC2012/Segmentation/comp6_SPLIT_cls/ID.png`, indexed, with Pascal's palette.
* `cityscapes`: `ID_pred_labelIds.png`, grey label ids (not train ids), at the labels' 1024×2048.
* others: `ID.png`, 8-bit grey class numbers.
"""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from protoseg_jax.data.label_sets import CITYSCAPES_IDS, VOC

_VOC_SPLITS = {"validation": "val"}


def submission(
    data_name: str, split: str, image_id: str, labels: UInt8[np.ndarray, "h w"]
) -> tuple[str, bytes]:
    """(path below the predictions' folder, PNG) of an image's predicted classes."""
    if data_name == "voc":
        folder = f"results/VOC2012/Segmentation/comp6_{_VOC_SPLITS.get(split, split)}_cls"
        return f"{folder}/{image_id}.png", _png(labels, VOC.colours)
    if data_name == "cityscapes":
        ids = np.array(CITYSCAPES_IDS, np.uint8)
        return f"{image_id}_pred_labelIds.png", _png(ids[labels])
    return f"{image_id}.png", _png(labels)


def _png(values: UInt8[np.ndarray, "h w"], palette: tuple[tuple[int, ...], ...] = ()) -> bytes:
    image = Image.fromarray(values)
    if palette:
        image = image.convert("P")
        image.putpalette([channel for colour in palette for channel in colour])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
