"""A phase compiles at its first step and never again, whatever the windows of its log."""

import jax

from protoseg_jax.training import loop
from protoseg_jax.training import run as runs
from tests.small import begin, make_config, make_data

COMPILED = "/jax/core/compile/backend_compile_duration"


def test_steps_after_a_phases_first_compile_nothing(tmp_path, monkeypatch):
    """Five steps in windows of two, two and one, of a small U-Net, which compiles fast."""
    make_data(tmp_path / "own")
    config = make_config(tmp_path)
    config.crop_size = config.eval_size = (40, 48)
    config.model.update({"backbone": "unet", "depth": 1, "width": 4, "output_stride": 1})
    new = {"decoder": 1e-3, "prototypes": 1e-3}
    config.phases.warmup.learning_rates = new
    config.phases.joint.learning_rates = {**new, "backbone": 1e-3}
    config.log_every, config.eval_every, config.checkpoint_every = 2, 0, 0
    for phase in config.phases:
        config.phases[phase].steps = 5 if phase in ("warmup", "joint") else 0
    events, seen, log = [], {}, loop._log

    def spy(live, board, phase, number, *rest):
        seen.setdefault(phase.name, []).append((number, len(events)))
        log(live, board, phase, number, *rest)

    monkeypatch.setattr(loop, "_log", spy)

    def listen(name, *_, **__):
        events.extend([name] * (name == COMPILED))

    jax.monitoring.register_event_duration_secs_listener(listen)
    live = begin(config, tmp_path / "run")
    try:
        runs.go(live)
    finally:
        live.workdir.release()
        jax.monitoring.unregister_event_duration_listener(listen)
    assert list(seen) == ["warmup", "joint"] and len(events) >= 2
    for windows in seen.values():
        numbers, compiled = zip(*windows, strict=True)
        assert numbers == (2, 4, 5) and len(set(compiled)) == 1
