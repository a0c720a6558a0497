"""Phase `directions`: a trained linear network is explained by directions of its features.

The network stays as it is; what is sought is the orthogonal U of `models/directions.py` by which
its decisions are *pure*. For a point n of predicted class c let q(d | n) be direction d's share of
Σ_d |(zU)_d (UᵀW)_dc|, and let every predicted class have the same probability, its points evenly.
U maximises the mutual information of direction and point,

    I(d; n) = H(d) − H(d | n) = H(n) − H(n | d),

so that each point's decision is made of few directions, and each direction decides few points, but
all directions together decide evenly: with more weight on H(d | n), one direction a class decides
everything. A direction's class is the one to whose predicted points it adds most, on average; its
patch is the point of a training image where it adds most to that class.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from protoseg_jax.models.directions import NO_CLASS
from protoseg_jax.program import Interrupted
from protoseg_jax.progress import Progress, say
from protoseg_jax.prototypes import project, search
from protoseg_jax.run.checkpoints import Checkpoint
from protoseg_jax.run.live import Clock, Live
from protoseg_jax.run.phases import Phase
from protoseg_jax.run.prototypes import new

_POINTS = 1 << 18  # of all training images, about
_FEWEST, _MOST = 16, 512  # of one image
_BATCH = 4096  # points a step
_CHUNK = 20  # steps between two looks at the clock
_TINY = 1e-12


def run(live: Live, phase: Phase, start: Checkpoint) -> Checkpoint:
    """The phase, from a `start` whose directions are the features' own axes.

    Raises:
      Interrupted: asked to stop; it begins again then.
    """
    clock, config = Clock(start, phase.name), live.experiment.config
    params = start.arrays["params"]
    kernel = np.asarray(params["head"]["kernel"], np.float64)
    weights, bias = kernel[:-1], kernel[-1]  # U is the identity: UᵀW is W
    points = _sample(live, start)
    kind, size = config.model.directions, len(weights)
    u = np.eye(size)
    if kind != "identity":
        u = random_rotation(size, config.seed)
    if kind == "trained":
        with Progress(phase.name, phase.steps, 0) as progress:

            def look(count: int) -> None:
                progress.update(count)
                if stop := live.asked_to_stop():
                    raise Interrupted(stop)

            rate = phase.learning_rates["prototypes"]
            u, found = find(points, weights, bias, u, phase.steps, rate, config.seed, look=look)
        say(f"directions: {found:.3f} nats of information on points")
    vectors, kernel, classes = entries(u, weights, bias, points)
    params = {
        **params,
        "prototypes": {"vectors": vectors.astype(np.float32)},
        "head": {"kernel": kernel.astype(np.float32)},
    }
    arrays = {"params": params, "frozen": start.arrays["frozen"]}
    directions = new([*classes, NO_CLASS])
    inference = live.experiment.inference(directions)
    table = search.empty(size + 1, 1, config.model.features)
    variables = dataclasses.replace(start, arrays=arrays).variables
    rule, title = search.of_any_class, "where directions are strongest"
    patches = search.search(live.experiment, inference, variables, rule, table, title)
    examples = live.experiment.examples(config.data.projection_split)
    for j in range(size):
        place = project.placed(directions[j], patches, j, examples, inference.feature_size)
        directions[j] = dataclasses.replace(place, squared_distance=None)
    names = live.experiment.labels.names
    without = [name for c, name in enumerate(names) if c not in classes]
    if without:
        say(f"no direction adds most to {', '.join(without)}; the sums hold for it all the same")
    return clock.checkpoint(phase.steps, arrays, directions, finished=True)


def random_rotation(size: int, seed: int) -> Float[np.ndarray, "d d"]:
    """An orthogonal matrix, uniformly at random."""
    q, r = np.linalg.qr(np.random.default_rng([seed, size]).normal(size=(size, size)))
    return q * np.sign(np.diag(r))


def entries(
    u: Float[np.ndarray, "d d"],
    weights: Float[np.ndarray, "d c"],
    bias: Float[np.ndarray, " c"],
    points: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, "m d"], Float[np.ndarray, "m c"], Int[np.ndarray, " d"]]:
    """(vectors, w_h, c(d)) of the directions, and of the bias as the last entry, m = d + 1.

    Args:
      u: U, orthogonal.
      weights, bias: W and b of the network's last layer.
      points: features of training points, by which classes are given.
    """
    s, k = points @ u, u.T @ weights
    predicted = (points @ weights + bias).argmax(1)
    adds = np.full((len(bias), len(u)), -np.inf)
    for c in np.unique(predicted):
        adds[c] = s[predicted == c].mean(0) * k[:, c]
    classes = adds.argmax(0)
    scale = k[np.arange(len(u)), classes]
    scale = np.where(np.abs(scale) > _TINY, scale, 1.0)
    vectors = np.concatenate([u.T * scale[:, None], np.zeros((1, len(u)))])
    return vectors, np.concatenate([k / scale[:, None], bias[None]]), classes


def information(
    u: Float[Array, "d d"],
    z: Float[Array, "n d"],
    weights: Float[Array, "d c"],
    predicted: Int[Array, " n"],
    probability: Float[Array, " n"],
) -> Float[Array, ""]:
    """I(d; n) in nats, see above; `probability` of each point, summing to 1."""
    q = shares(u, z, weights, predicted)
    of_points = (jax.scipy.special.entr(q).sum(1) * probability).sum()
    return jax.scipy.special.entr(probability @ q).sum() - of_points


def shares(
    u: Float[Array, "d d"],
    z: Float[Array, "n d"],
    weights: Float[Array, "d c"],
    predicted: Int[Array, " n"],
) -> Float[Array, "n d"]:
    """q(d | n), see above."""
    exact = jax.lax.Precision.HIGHEST
    s, k = jnp.matmul(z, u, precision=exact), jnp.matmul(u.T, weights, precision=exact)
    parts = jnp.abs(s * k.T[predicted]) + _TINY
    return parts / parts.sum(1, keepdims=True)


def _sample(live: Live, start: Checkpoint) -> Float[np.ndarray, "n d"]:
    """Features of some random points of every training image."""
    experiment, pool = live.experiment, live.experiment.pool
    inference = experiment.inference(start.prototypes)
    split = experiment.config.data.projection_split
    images = len(experiment.examples(split))
    count = int(np.clip(_POINTS // images, _FEWEST, _MOST))
    count = min(count, int(np.prod(inference.feature_size)))
    key = jax.random.key(experiment.config.seed)

    def step(variables: Any, batch: dict[str, Array]) -> dict[str, Array]:
        features = inference(variables, batch["image"]).features
        flat = features.reshape(len(features), -1, features.shape[-1])

        def some(n: Int[Array, ""], of: Float[Array, "p d"]) -> Float[Array, "s d"]:
            return jax.random.choice(jax.random.fold_in(key, n), of, (count,), replace=False)

        return {"features": jax.vmap(some)(batch["index"], flat), "index": batch["index"]}

    found = []
    with Progress("points", images, 0, "image", brief=True) as progress:
        for _, out in pool.outputs(step, start.variables, experiment.eval_batches(split)):
            out = pool.all(out)
            real = out["index"].reshape(-1) >= 0
            index = out["index"].reshape(-1)[real]
            rows = out["features"].reshape(-1, count, out["features"].shape[-1])[real]
            found += zip(index.tolist(), rows, strict=True)
            progress.update(int(real.sum()))
    return np.concatenate([rows for _, rows in sorted(found, key=lambda pair: pair[0])])


Objective = Callable[
    [
        Float[Array, "d d"],  # U
        Float[Array, "n d"],  # z
        Float[Array, "d c"],  # W
        Int[Array, " n"],  # predicted classes
        Float[Array, " n"],  # probabilities
    ],
    Float[Array, ""],
]


def find(
    points: Float[np.ndarray, "n d"],
    weights: Float[np.ndarray, "d c"],
    bias: Float[np.ndarray, " c"],
    start: Float[np.ndarray, "d d"],
    steps: int,
    rate: float,
    seed: int,
    *,
    objective: Objective = information,
    look: Callable[[int], None] = lambda count: None,
) -> tuple[Float[np.ndarray, "d d"], float]:
    """(the U of most `information`, that of the last batch): `start` turned by the exponential of a
    skew matrix, by Adam with polynomial decay.

    A batch has as many points of each predicted class, as far as there are such points.

    Args:
      points: features of training points.
      weights, bias: W and b of the network's last layer.
      steps: at least 1.
      objective: what is sought instead, as large as it can be, if it is not `information`.
      look: is told how many steps were done, every few; what it raises ends the search.
    """
    predicted = (points @ weights + bias).argmax(1)
    members = [np.flatnonzero(predicted == c) for c in np.unique(predicted)]
    each = max(_BATCH // len(members), 1)
    optimizer = optax.adam(optax.polynomial_schedule(rate, 0.0, 0.9, steps))
    wide = jnp.asarray(weights, jnp.float32)
    probability = jnp.full(each * len(members), 1.0 / (each * len(members)))

    def turned(skew: Float[Array, "d d"]) -> Float[Array, "d d"]:
        turn = jax.scipy.linalg.expm(skew - skew.T)
        return jnp.matmul(jnp.asarray(start, jnp.float32), turn, precision="highest")

    def loss(skew, z, c):
        return -objective(turned(skew), z, wide, c, probability)

    @jax.jit
    def some(state: Any, z: Float[Array, "t n d"], c: Int[Array, "t n"]) -> tuple[Any, Array]:
        def one(state, batch):
            skew, moments = state
            value, gradient = jax.value_and_grad(loss)(skew, *batch)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(skew, updates), moments), value

        return jax.lax.scan(one, state, (z, c))

    rng = np.random.default_rng(seed)
    skew = jnp.zeros(start.shape, jnp.float32)
    state, done = (skew, optimizer.init(skew)), 0
    while done < steps:
        count = min(_CHUNK, steps - done)
        chosen = np.stack(
            [np.concatenate([rng.choice(m, each) for m in members]) for _ in range(count)]
        )
        state, values = some(state, points[chosen], predicted[chosen])
        done += count
        look(count)
    return nearest_rotation(np.asarray(turned(state[0]), np.float64)), -float(values[-1])


def nearest_rotation(u: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The orthogonal matrix nearest to one that is so but for rounding."""
    left, _, right = np.linalg.svd(u)
    return left @ right
