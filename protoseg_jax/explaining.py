"""What explain.py does: a run's page, its figures, and a run without some prototypes."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from protoseg_jax import api
from protoseg_jax.data.label_sets import VOID
from protoseg_jax.devices import psum
from protoseg_jax.errors import UserError
from protoseg_jax.evaluation import evaluate as evaluation
from protoseg_jax.evaluation import interpretability
from protoseg_jax.explain import evidence, explorer, figures, paper
from protoseg_jax.inference import Inference, cell_box, shrink_labels
from protoseg_jax.progress import say
from protoseg_jax.prototypes import patch_search
from protoseg_jax.prototypes.pruning import NEIGHBOURS
from protoseg_jax.training import run as runs
from protoseg_jax.training.run import Run
from protoseg_jax.workdir import Checkpoint, Workdir, write_json

_IMAGES = 10  # of a split, on the page


def explain_run(workdir: str, split: str, images: Sequence[str], out: str | None) -> Path:
    """Write a run's explorer page.

    Args:
      workdir: the run's folder.
      split: whose images, evenly chosen, are shown, and over which points won are counted.
      images: paths to show instead.
      out: the page's folder; None for DIR/explain.

    Returns:
      The page.

    Raises:
      UserError: no run there, it has no prototypes, an image cannot be read, or there are neither
        images nor the data set.
    """
    model = api.load(workdir)
    model.require_prototypes()
    target = Path(out) if out else model.workdir.path / "explain"
    checked_target(target)
    pictures = [(Path(path).stem, api.read(path), None) for path in images]
    notes = []
    try:
        run = Run(model.config, model.workdir)
    except UserError as error:
        if not images:
            raise UserError(f"{error}; or name images with --images=PATH,…") from error
        run = None
        notes.append(
            "The data set is not at hand: shares of points won and nearest patches are left out."
        )
    pictures = pictures or split_images(run, split)
    if not model.projected:
        notes.append(
            f"This run has come to phase {model.phase}, before projection: its prototypes are "
            "learnt vectors, not yet patches of training images, so there is nothing to show of "
            "where they come from."
        )
    absent = [p.index for p in model.prototypes if model.projected and p.source is None]
    if absent:
        notes.append(
            "The training images of "
            + ("all prototypes" if len(absent) == len(model.prototypes) else f"{len(absent)}")
            + " are not with the run; their patches are."
        )
    shown = [image for picture in pictures for image in _shown(model, *picture)]
    cards = _cards(model, run, split)
    explorer.write(
        target,
        title=model.workdir.path.name,
        facts=_facts(model, split, images),
        notes=notes,
        classes=model.classes,
        vectors=np.asarray(model.checkpoint.arrays["params"]["prototypes"]["vectors"]),
        kernel=model.kernel,
        similarity=model.config.model.get("similarity", "log"),
        cards=cards,
        images=shown,
    )
    return target / "index.html"


def checked_target(out: Path) -> None:
    """Refuse to replace a folder that is no page.

    Raises:
      UserError: it holds something else, or cannot be written.
    """
    if out.exists() and not (out / "data" / "run.js").exists() and any(out.iterdir()):
        raise UserError(f"{out} holds something that is no explorer page; name another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}); name another --out"
        ) from error


def split_images(run: Run, split: str) -> list[tuple[str, np.ndarray, np.ndarray | None]]:
    """(name, image, labels or None) of a split's images, evenly chosen."""
    source, labelled = run.data.source(split), run.data.labelled(split)
    chosen = np.unique(np.linspace(0, len(source) - 1, _IMAGES).astype(int)).tolist()
    examples = [source[n] for n in chosen]
    return [(e["image_id"], e["image"], e["label"] if labelled else None) for e in examples]


def _facts(model: api.Model, split: str, images: Sequence[str]) -> list[str]:
    facts = [f"phase {model.phase}", f"{len(model.prototypes)} prototypes"]
    facts += [f"{len(model.classes)} classes", "your images" if images else f"{split} images"]
    scores = {e["phase"]: e["miou"] for e in model.workdir.summary()}
    if scores.get(model.phase) is not None:
        facts.append(f"validation mIoU {100 * scores[model.phase]:.1f} %")
    return facts


def _shown(model, name, image, truth) -> list[explorer.Shown]:
    """An image, or each of its tiles, as the page wants it."""
    why = model.explain(image)
    labels = why.segmentation.labels
    found = []
    for part, (corner, _, cut) in zip(why.parts, model.cuts(image), strict=True):
        window = tuple(slice(c, c + n) for c, n in zip(corner, part.size, strict=True))
        here = name if len(why.parts) == 1 else f"{name} from ({corner[0]}, {corner[1]})"
        local = None if truth is None else truth[window]
        regions = []
        if local is not None:
            regions = explorer.wrong_regions(labels[window], local, len(model.classes))
            for region in regions:
                rows, cols = region["samples"]
                seen = api.explain_pixels_of(part, model.kernel, rows, cols).similarities
                region["causes"] = explorer.causes(
                    seen, model.kernel, region["label"], region["truth"]
                )
        found.append(
            explorer.Shown(
                name=here,
                image=cut,
                truth=local,
                labels=labels[window],
                features=part.points.features,
                similarities=part.points.similarities,
                regions=regions,
            )
        )
    return found


def _cards(model: api.Model, run: Run | None, split: str) -> list[explorer.PrototypeCard]:
    shares = [None] * len(model.prototypes)
    nearest = [[] for _ in model.prototypes]
    if run:
        won, _ = point_counts(run, model, split)
        shares = (won / max(won.sum(), 1)).tolist()
        nearest = _nearest(run, model)
    return [
        explorer.PrototypeCard(
            index=p.index,
            class_=p.class_,
            image_id=p.image_id,
            box=p.box,
            source_size=p.source_size,
            patch=p.patch,
            patch_box=p.patch_box,
            source=p.source,
            share=share,
            nearest=near,
        )
        for p, share, near in zip(model.prototypes, shares, nearest, strict=True)
    ]


@functools.lru_cache(maxsize=2)
def _make_counts_step(inference: Inference, prototype_classes: tuple[int, ...]):
    """step(variables, batch) → psum'd counts of `point_counts`."""

    def step(variables, batch):
        output = inference(variables, batch["image"])
        real = (batch["index"] >= 0)[:, None, None]
        winners = evidence.explain_points(output, variables["params"]["head"]["kernel"]).prototype
        count = len(prototype_classes)
        won = jnp.zeros(count + 1, jnp.int32)
        won = won.at[jnp.where(real, winners, count).reshape(-1)].add(1)[:-1]
        labels = shrink_labels(batch["label"], batch["size"], output.features.shape[1:3])
        used = jax.lax.map(
            lambda x: interpretability.wins(*x, np.array(prototype_classes)),
            (output.similarities, jnp.where(real, labels, VOID)),
        )
        return psum((won, used.sum(0)))

    return step


def point_counts(run: Run, model: api.Model, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(points won, points of its class) of each prototype over a split, int64 [M] each.

    A point is won by the prototype that contributes most to the class it gets; of its true class's
    prototypes it belongs to the one that is most similar (Fig. 5).
    """
    say(f"counting the points of each prototype in {split}")
    classes = tuple(p.class_ for p in model.prototypes)
    step = run.pool.map(_make_counts_step(model.inference, classes))
    variables = run.pool.replicate(model.checkpoint.variables)
    counts = np.zeros((2, len(classes)), np.int64)
    for batch in run.pool.prefetch(run.eval_batches(split)):
        counts += np.array(run.pool.first(step(variables, batch)))
    return counts[0], counts[1]


def _nearest(run: Run, model: api.Model):
    """For each prototype (picture, class, image) of its nearest patches in the projection split."""
    say("searching the training patches nearest to each prototype")
    split = run.config.data.projection_split
    classes = run.classes_of(model.checkpoint.prototypes)
    patches = patch_search.search(
        run.pool,
        patch_search.make_search_step(model.inference, classes, k=NEIGHBOURS, within_class=False),
        model.checkpoint.variables,
        run.eval_batches(split),
        patch_search.empty(len(classes), NEIGHBOURS, run.config.model.features),
    )
    examples = run.examples(split)
    found = [[] for _ in classes]
    size = feature_size(model)
    places = [
        (int(patches.image[j, k]), j, k)
        for j in range(len(classes))
        for k in range(NEIGHBOURS)
        if np.isfinite(patches.squared_distance[j, k])
    ]
    pictures = {}
    for number, j, k in sorted(places):  # each image is read once
        if number != pictures.get("number"):
            pictures = {"number": number, "example": examples[number]}
        example = pictures["example"]
        row, col = int(patches.row[j, k]), int(patches.col[j, k])
        box = cell_box(row, col, size, example["image"].shape[:2])
        crop = figures.crop_with_context(example["image"], box)[0]
        found[j].append((k, crop, int(patches.label[j, k]), example["image_id"]))
    return [[x[1:] for x in sorted(f, key=lambda x: x[0])] for f in found]


def feature_size(model: api.Model) -> tuple[int, int]:
    """(h, w) of the feature map at the run's evaluation size."""
    image = jax.ShapeDtypeStruct((1, *model.inference.eval_size, 3), np.uint8)
    variables = model.checkpoint.variables
    return jax.eval_shape(model.inference, variables, image).features.shape[1:3]


def draw_figures(
    workdir: str,
    split: str,
    images: Sequence[str],
    out: str | None,
    names: Sequence[str],
    compare: str | None,
) -> list[Path]:
    """Draw some of the paper's figures (`paper`), a second run beside the first if one is named.

    Args:
      workdir, split, images: as in `explain_run`.
      out: folder of the figures; None for DIR/figures.
      names: keys of `paper.FIGURES`.
      compare: a second run's folder, of the same classes.

    Raises:
      UserError: as `explain_run`; or a figure is unknown, or the runs' classes differ.
    """
    unknown = [name for name in names if name not in paper.FIGURES]
    if unknown:
        raise UserError(
            f"figure {', '.join(unknown)} is unknown; there are {', '.join(paper.FIGURES)}"
        )
    models = [api.load(path) for path in (workdir, compare) if path]
    for model in models:
        model.require_prototypes()
    if models[0].classes.names != models[-1].classes.names:
        raise UserError(f"runs {workdir} and {compare} have different classes; compare like runs")
    run = Run(models[0].config, models[0].workdir)
    found = [(Path(path).stem, api.read(path), None) for path in images]
    pictures = [paper.Picture(*p) for p in found or split_images(run, split)]
    sides = [_side(model, pictures, split) for model in models]
    if sides[0].name == sides[-1].name and compare:
        sides[1] = dataclasses.replace(sides[1], name=f"{sides[1].name} (2)")
    target = Path(out) if out else models[0].workdir.path / "figures"
    written = []
    for name in dict.fromkeys(names):
        written += paper.FIGURES[name](target, pictures, sides, models[0].classes)
    return written


def _side(model: api.Model, pictures: Sequence[paper.Picture], split: str) -> paper.Side:
    """A run as the figures want it."""
    _, counts = point_counts(Run(model.config, model.workdir), model, split)
    seen = []
    for picture in pictures:
        why = model.explain(picture.image)
        labels = why.segmentation.labels
        seen.append(paper.Seen(labels, why.similarities, why.winning_prototype))
    return paper.Side(
        name=model.workdir.path.name,
        prototype_classes=np.array([p.class_ for p in model.prototypes]),
        ids=[p.index for p in model.prototypes],
        patches=[None if p.patch is None else (p.patch, p.patch_box) for p in model.prototypes],
        counts=counts,
        seen=seen,
    )


def remove(workdir: str, ids: Sequence[str], to: str, *, force: bool) -> None:
    """A new run without some prototypes, its last layer fine-tuned; prints what changed.

    The new run stands after pruning; what follows is phase `finetune_pruned` with its settings
    (those of `finetune` where a config has no such phase). The same call on a folder where this
    was interrupted goes on. The original is only read.

    Args:
      workdir: the run's folder.
      ids: numbers of the prototypes ("index" in prototypes.json).
      to: the new run's folder.
      force: also take a class's last prototype away.

    Raises:
      UserError: no such run or prototype, a class would have none left, the run is not projected,
        or the folder holds something else.
    """
    model = api.load(workdir)
    model.require_prototypes()
    if not model.projected:
        raise UserError(
            f"run {workdir!r} has come to phase {model.phase}, before projection, so its "
            "prototypes are not patches yet; let train.py go on"
        )
    keep = _kept(model, ids, force)
    origin = {
        "from": str(model.workdir.path),
        "phase": model.phase,
        "removed": sorted(map(int, ids)),
    }
    config = _removal_config(model.config)
    folder = Workdir(to)
    record = folder.path / "removed.json"
    going_on = record.exists() and origin.items() <= json.loads(record.read_text()).items()
    if folder.path.exists() and any(folder.path.iterdir()) and not going_on:
        raise UserError(f"{to} is not empty; name a new folder with --to")
    run = Run(config, folder)
    run.pool.check_batch(config.batch_size, config.accumulate)
    before = Run(model.config, model.workdir).score(model.checkpoint, "validation", overlap=False)
    try:
        with run.interrupts:
            folder.start(config, runs.manifest(config))
            if not going_on:
                arrays, prototypes = runs.keep_prototypes(model.checkpoint, keep)
                folder.save(Checkpoint("pruning", 1, True, arrays, prototypes))
                folder.wait()
                write_json(record, origin)
            run.go()
            final = folder.restore(run.phases[-1].name)
            after = run.score(final, "validation", overlap=False)
    finally:
        folder.finish_writing()
        folder.release()
    write_json(record, {**origin, "before": before, "after": after})
    print(evaluation.change_table(before, after, model.classes.names))


def _kept(model: api.Model, ids: Sequence[str], force: bool) -> np.ndarray:
    """Positions of the prototypes that stay.

    Raises:
      UserError: see `remove`.
    """
    known = [p.index for p in model.prototypes]
    unknown = [i for i in ids if not i.isdecimal() or int(i) not in known]
    if unknown:
        raise UserError(
            f"run {str(model.workdir.path)!r} has no prototype {', '.join(unknown)}; "
            f'its {len(known)} prototypes are in prototypes.json, by "index"'
        )
    gone = set(map(int, ids))
    keep = np.array([j for j, p in enumerate(model.prototypes) if p.index not in gone], int)
    left = {model.prototypes[j].class_ for j in keep.tolist()}
    bare = sorted({p.class_ for p in model.prototypes} - left)
    if not left or (bare and not force):
        names = ", ".join(repr(model.classes.names[c]) for c in bare)
        raise UserError(
            f"this would take the last prototype of class {names} away, and nothing would argue "
            "for it any more; keep one" + (", or add --force" if left else "")
        )
    return keep


def _removal_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with a pruning phase and a fine-tuning after it."""
    config = config.copy_and_resolve_references()
    phases = config.phases
    phases.pruning = {"steps": 1}
    if not phases.get("finetune_pruned", {}).get("steps"):
        if not phases.get("finetune", {}).get("steps"):
            raise UserError(
                "the run's config has neither a finetune_pruned nor a finetune phase, which say "
                "how the last layer is trained; name a run that has one"
            )
        phases.finetune_pruned = phases.finetune.copy_and_resolve_references()
    return config
