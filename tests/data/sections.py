"""A made-up EM volume in the challenge's layouts: bright cells, dark membranes."""

import numpy as np
from PIL import Image


def make_sections(count, size=64, seed=0):
    """[(grey uint8 [size size], label uint8 of 0 and 255), …]."""
    rng = np.random.default_rng(seed)
    sections = []
    for _ in range(count):
        middles = rng.uniform(0, size, (9, 2))
        y, x = np.mgrid[:size, :size]
        distances = np.sort(
            np.hypot(y[..., None] - middles[:, 0], x[..., None] - middles[:, 1]), axis=-1
        )
        inside = distances[..., 1] - distances[..., 0] > 4
        grey = np.where(inside, 170, 70) + rng.normal(0, 12, inside.shape)
        sections.append((np.clip(grey, 0, 255).astype(np.uint8), (255 * inside).astype(np.uint8)))
    return sections


def write_stack(path, pages):
    """Arrays as a multi-page TIFF."""
    first, *rest = [Image.fromarray(page) for page in pages]
    first.save(path, save_all=True, append_images=rest)


def make_stacks(root, count=6, size=64, test=0):
    """The official files; returns the sections."""
    root.mkdir(parents=True, exist_ok=True)
    sections = make_sections(count, size)
    write_stack(root / "train-volume.tif", [image for image, _ in sections])
    write_stack(root / "train-labels.tif", [label for _, label in sections])
    if test:
        write_stack(root / "test-volume.tif", [i for i, _ in make_sections(test, size, 1)])
    return sections


def make_folders(root, count=6, size=64):
    """One PNG a section; returns the sections."""
    sections = make_sections(count, size)
    for name in ("image", "label"):
        (root / name).mkdir(parents=True)
    for number, (image, label) in enumerate(sections):
        Image.fromarray(image).save(root / "image" / f"{number}.png")
        Image.fromarray(label).save(root / "label" / f"{number}.png")
    return sections


def changed(name, change):
    """What writes one of the stacks anew, its pages changed."""

    def spoil(root):
        which = 0 if name == "train-volume.tif" else 1
        write_stack(root / name, change([section[which] for section in make_sections(6)]))

    return spoil


def three_values(labels):
    return [np.where(x > 0, 255, 128 * (x.T > 0)).astype(np.uint8) for x in labels]


# name: (what is done to the official files, words of the line that tells it)
BAD = {
    "fewer labels than images": (
        changed("train-labels.tif", lambda p: p[:-1]),
        "holds 6 sections but train-labels.tif 5",
    ),
    "16 bits": (
        changed("train-volume.tif", lambda p: [x.astype(np.uint16) * 100 for x in p]),
        "16-bit values up to",
    ),
    "colours": (
        changed("train-volume.tif", lambda p: [np.stack([x, x, 255 - x], 2) for x in p]),
        "is in colour",
    ),
    "floats": (
        changed("train-volume.tif", lambda p: [x.astype(np.float32) for x in p]),
        "has mode F",
    ),
    "three label values": (
        changed(
            "train-labels.tif",
            lambda p: [np.where(x > 0, 255, 128 * (x.T > 0)).astype(np.uint8) for x in p],
        ),
        "holds the value 128 ",
    ),
    "labels of another size": (
        changed("train-labels.tif", lambda p: [x[:-1] for x in p]),
        "is 64×64 but section",
    ),
    "no stack": (
        lambda root: (root / "train-volume.tif").write_bytes(b"no image"),
        "is no TIFF stack",
    ),
    "no labels": (lambda root: (root / "train-labels.tif").unlink(), "is missing beside"),
}
