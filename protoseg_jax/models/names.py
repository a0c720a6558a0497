"""Names of tensors: where in a file's a network's are, and which is nearest to one that is missing.

A network seldom stands alone in a checkpoint: whoever trained it had it in another module, which
puts its own name before every tensor's (`model.backbone.conv1.weight`).
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from protoseg_jax.errors import UserError

_NAMED, _NAME = 4, 150  # names in a message, of each kind; characters of each
_COMPARED = 1000  # names that are compared with one that is missing

# By origin (a key of a network's `ORIGINS`): a tensor that each network so named has once.
KNOWN_BY = {
    "torchvision": "layer1.0.conv1.weight",
    "transformers": "encoder.stages.0.layers.0.layer.0.convolution.weight",
    "deeplab": "layer1.conv1.conv.weight",
    "efficientnet_lite": "_conv_stem.weight",
}
# What modules call the network within them; `_orig_mod` is torch.compile's, `resnet` that of
# transformers' classifiers. Nested in any order.
WRAPPERS = ("_orig_mod", "module", "model", "backbone", "encoder", "ppnet", "resnet")
# Behind those the authors' ProtoSeg has its backbone here, and prototypes beside it.
_OWN = r"(?:features\.)?(?:base\.)?"


def named(names: Iterable[str]) -> str:
    """The first of some names, for a message; long ones are cut."""
    names = list(names)
    shown = [n if len(n) <= _NAME else f"{n[:_NAME]}…" for n in names[:_NAMED]]
    return ", ".join(shown) + ", …" * (len(names) > _NAMED)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that is most like one, if any is alike: rather the same with something before it."""
    near = [n for n in names if len(n) <= 2 * _NAME][:_COMPARED]
    longer = [n for n in near if n.endswith(f".{name}")]
    return next(iter(longer or difflib.get_close_matches(name, near, 1)), None)


def within(tensors: Mapping[str, Any], origins: Iterable[str], where: Any) -> dict[str, Any]:
    """The tensors of the one network in a file `where`, by their names in it, without `WRAPPERS`.

    The network is where `KNOWN_BY` of one of the origins is. If something stands before that name,
    tensors without it are another module's (a segmenter's head, a loss) and are left out; if
    nothing does, or no network is found, all of them are returned as they are.

    Raises:
      UserError: the file has several networks (a teacher, a moving average), or what stands before
        its names is none of `WRAPPERS`.
    """
    known = [KNOWN_BY[origin] for origin in origins if origin in KNOWN_BY]
    found = [(n, k) for k in known for n in tensors if n == k or n.endswith(f".{k}")]
    if not found:
        return dict(tensors)
    if len(found) > 1:
        raise UserError(
            f"weights {where} hold {len(found)} networks ({named(n for n, _ in found)}), of which "
            "one is wanted; leave that one in the file"
        )
    name, known_by = found[0]
    before = name.removesuffix(known_by)
    match = re.fullmatch(rf"((?:(?:{'|'.join(WRAPPERS)})\.)*){_OWN}", before)
    if match is None:
        raise UserError(
            f"weights {where} have no {known_by}, but {named([name])}: save them without what is "
            f"before it ({named([before])}); only {', '.join(f'{w}.' for w in WRAPPERS)} are left "
            "out by themselves"
        )
    wrapper = match[1]
    return {n.removeprefix(wrapper): t for n, t in tensors.items() if n.startswith(wrapper)}
