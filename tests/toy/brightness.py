"""A measure from outside: the share of judged points that are told to be squares."""

from protoseg_jax.evaluation.measures import Measure

TITLES = (("squares", "points told to be squares", 100),)


def make(context):
    return Measure(_step, lambda found: {"squares": float(found[0] / found[1])})


def _step(seen):
    told = seen.output.logits.argmax(-1) == 1
    return (told & seen.judged).sum(), seen.judged.sum()
