"""What a config says, without training: its data and classes, batches, models and devices."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from protoseg_jax import inference
from protoseg_jax.data import augment, pipeline, prepare, tiles
from protoseg_jax.data.labels import LabelSet
from protoseg_jax.data.source import SegmentationData, Source, Without
from protoseg_jax.devices import DevicePool
from protoseg_jax.errors import UserError
from protoseg_jax.losses import cross_entropy
from protoseg_jax.models.preprocessing import Preprocessing
from protoseg_jax.models.preprocessing import from_config as preprocessing_of
from protoseg_jax.run import phases
from protoseg_jax.run.prototypes import Prototype, classes_of


class Experiment:
    """A config's data, classes, batches and inference. The data set is prepared when first asked.

    Args:
      config: with every key (`config.complete`).
      pool: the devices; all of them by default.
      labels: the classes, where they are known without the data set.

    Attributes:
      config, pool: as given.
      phases: the config's, in order.
      black_box: whether the head is linear, without prototypes.
      trains_prototypes: whether it has prototypes, and not directions.

    Raises:
      UserError: the phases do not fit the network.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        pool: DevicePool | None = None,
        labels: LabelSet | None = None,
    ):
        self.config = config
        self.pool = pool or DevicePool()
        self.phases = phases.from_config(config)
        self.black_box = config.model.head == "linear"
        self.trains_prototypes = config.model.head == "prototypes"
        self._labels = labels
        self._tiled: dict[tuple[str, bool], tiles.Tiled] = {}

    @functools.cached_property
    def data(self) -> SegmentationData:
        """The prepared data set.

        Raises:
          UserError: it is not there or wrong.
        """
        return prepare.open_data(self.config)

    @functools.cached_property
    def labels(self) -> LabelSet:
        """The classes: those given, else the data set's."""
        return self._labels or prepare.labels_of(self.config)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.labels)

    @functools.cached_property
    def held_out(self) -> int | None:
        """The class of `data.held_out`, which is void for this run and has no prototypes.

        Raises:
          UserError: there is no such class.
        """
        name, names = self.config.data.held_out, self.labels.names
        if name and name not in names:
            raise UserError(
                f"data.held_out={name!r} is no class of data set {self.config.data.name!r}; "
                f"choose one of: {', '.join(names)}"
            )
        return names.index(name) if name else None

    def class_weights(self) -> np.ndarray | None:
        """Weights of the cross-entropy by `loss.class_balance`, or None: all alike.

        A class held out has no say in the others' weights, and 1 itself.
        """
        power = self.config.loss.class_balance
        if not power:
            return None
        learnt = [c for c in range(self.num_classes) if c != self.held_out]
        weights = np.ones(self.num_classes, np.float32)
        pixels = self.data.class_pixels(self.config.data.train_split)
        weights[learnt] = cross_entropy.class_weights(pixels[learnt], power)
        return weights

    # -- images --------------------------------------------------------------------------------

    def source(self, split: str) -> Source | Without:
        """A split's images and labels, a held-out class void."""
        source = self.data.source(split)
        return source if self.held_out is None else Without(source, self.held_out)

    def examples(self, split: str, *, held_out: bool = False) -> Any:
        """What evaluation and search look at, one after another: a split's images, or with
        `eval_overlap` their tiles. `held_out` keeps the labels of a class that is held out."""
        source = self.data.source(split) if held_out else self.source(split)
        overlap = self.config.eval_overlap
        if overlap is None:
            return source
        if (split, held_out) not in self._tiled:  # it looks at every image's size
            tiled = tiles.Tiled(source, tuple(self.config.eval_size), overlap)
            self._tiled[split, held_out] = tiled
        return self._tiled[split, held_out]

    @property
    def eval_batch_size(self) -> int:
        """Images an evaluation batch of this process: the config's, rounded up to the devices."""
        return -(-self.config.eval_batch_size // self.pool.total) * self.pool.count

    def eval_batches(
        self, split: str, start: int = 0, *, held_out: bool = False
    ) -> Iterator[dict[str, np.ndarray]]:
        """This process's part of `examples`, from one on, at evaluation preprocessing."""
        return pipeline.eval_batches(
            self.examples(split, held_out=held_out),
            eval_size=tuple(self.config.eval_size),
            batch_size=self.eval_batch_size,
            workers=self.config.data.workers,
            start=start,
            part=(self.pool.process, self.pool.processes),
            largest=self.data.label_size(split) if self.pool.processes > 1 else None,
        )

    @property
    def augmentation(self) -> augment.Augment:
        return augment.from_config(self.config, self.preprocessing.padding_colour)

    def train_batches(self, start: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's part of the augmented training batches, from number `start` on."""
        config = self.config
        return pipeline.train_batches(
            self.source(config.data.train_split),
            self.augmentation,
            batch_size=config.batch_size,
            seed=config.seed,
            start=start,
            workers=config.data.workers,
            part=(self.pool.process, self.pool.processes),
        )

    # -- models --------------------------------------------------------------------------------

    @property
    def preprocessing(self) -> Preprocessing:
        return preprocessing_of(self.config.model)

    def inference(self, prototypes: Sequence[Prototype]) -> inference.Inference:
        """The model for these prototypes, and the one way from an image to its logits."""
        return inference.from_config(
            self.config, self.num_classes, tuple(classes_of(prototypes).tolist())
        )
