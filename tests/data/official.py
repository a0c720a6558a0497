"""Small VOCdevkit and Cityscapes trees in exactly the official layouts, with made-up streets."""

import zipfile

import numpy as np
from PIL import Image

from protoseg_jax.data.sets import cityscapes, voc


def stripes(classes, size, seed):
    """Labels in which every class has some pixels, and an image with a colour of each class."""
    rng = np.random.default_rng(seed)
    h, w = size
    cells = rng.permutation(np.resize(np.arange(classes), 24)).reshape(4, 6)
    labels = cells[np.arange(h)[:, None] * 4 // h, np.arange(w) * 6 // w].astype(np.uint8)
    colours = np.random.default_rng(7).integers(0, 256, (classes, 3))
    image = colours[labels] + rng.normal(0, 8, (h, w, 3))
    return labels, np.clip(image, 0, 255).astype(np.uint8)


def save_palette(path, labels):
    image = Image.fromarray(labels).convert("P")
    image.putpalette([channel for colour in voc.LABELS.colours for channel in colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def make_voc(root, *, train_aug=True):
    """2 train, 2 augmented, 2 validation and 1 test images below root/VOCdevkit/VOC2012."""
    home = root / "VOCdevkit" / "VOC2012"
    lists = home / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (home / "JPEGImages").mkdir()
    stems = {
        "train": ["2007_000032", "2007_000039"],
        "aug": ["2008_000002", "2008_000007"],
        "val": ["2007_000033", "2007_000042"],
        "test": ["2008_000006"],
    }
    for number, (kind, stem) in enumerate((k, s) for k, names in stems.items() for s in names):
        labels, image = stripes(21, (60, 80) if number % 2 else (72, 64), number)
        labels[:3] = 255
        Image.fromarray(image).save(home / "JPEGImages" / f"{stem}.jpg", quality=95)
        if kind in ("train", "val"):
            save_palette(home / "SegmentationClass" / f"{stem}.png", labels)
        if kind != "test":
            path = home / "SegmentationClassAug" / f"{stem}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(labels).save(path)  # grey, as SBD's converted masks are
    for name in ("train", "val", "test"):
        (lists / f"{name}.txt").write_text("\n".join(stems[name]) + "\n")
    if train_aug:
        lines = (f"/JPEGImages/{s}.jpg /SegmentationClassAug/{s}.png" for s in stems["aug"])
        (lists / "train_aug.txt").write_text("\n".join(lines) + "\n")
    return home


CITIES = {"train": ["aachen", "zurich"], "val": ["frankfurt"], "test": ["berlin"]}


def make_cityscapes(root, size=(64, 128)):
    """Two images a city below root/leftImg8bit and root/gtFine."""
    seed = 0
    for split, cities in CITIES.items():
        for city in cities:
            for number in range(2):
                name = f"{city}_00000{number}_000019"
                labels, image = stripes(len(cityscapes.LABELS), size, seed)
                seed += 1
                ids = np.array(cityscapes.IDS, np.uint8)[labels]
                ids[:4] = 1  # ego vehicle: void
                if split == "test":
                    ids[:] = 0
                for top, kind, array in (
                    ("leftImg8bit", "leftImg8bit", image),
                    ("gtFine", "gtFine_labelIds", ids),
                ):
                    path = root / top / split / city / f"{name}_{kind}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(path)


def zip_cityscapes(root, target):
    """The two official zips of a tree."""
    target.mkdir()
    for top in ("leftImg8bit", "gtFine"):
        with zipfile.ZipFile(target / f"{top}_trainvaltest.zip", "w") as archive:
            archive.writestr("README", "made up")
            for path in sorted((root / top).rglob("*.png")):
                archive.write(path, path.relative_to(root))
