"""Runners of models that calls of a tool share, in the tests of that tool."""

import dataclasses

from ds4jax.engine import compile_cache, model_runner

MODEL_RUNNER = model_runner.ModelRunner


class KeptRunners:
    """Stands for `ModelRunner`: what is compiled once serves all calls with the same settings and batch.

    made: the runners.
    """

    def __init__(self):
        self.made = {}

    def install(self, monkeypatch):
        monkeypatch.setattr(model_runner, "ModelRunner", self)
        monkeypatch.setattr(compile_cache, "keep_compilations", lambda: None)

    def __call__(self, checkpoint, settings, batch, progress, sizes):
        key = dataclasses.replace(settings, max_tokens=1), batch
        if key not in self.made:
            self.made[key] = MODEL_RUNNER(checkpoint, settings, batch, progress, sizes)
        self.made[key].stats = model_runner.Stats()
        return self.made[key]
