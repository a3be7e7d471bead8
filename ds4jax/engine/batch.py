"""Batch jobs: any number of requests through the slots of one runner. No JAX here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ds4jax.engine.model_runner import ModelRunner, Sampled
    from ds4jax.engine.sampling import Sampling

Finish = Literal["stop", "length"]
"""Why a sequence ended: the model's end token, or max_tokens or the context."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how to continue it: token ids, at most max_tokens more of them, chosen as `sampling` says."""

    tokens: list[int]
    max_tokens: int
    sampling: Sampling


def run(
    runner: ModelRunner, requests: Iterable[Request], eos: int, logits: bool = False
) -> Iterator[tuple[Request, Sampled, Finish | None]]:
    """Continue all requests, as many at a time as the runner has slots.

    Yields every token as it comes, the one that ends a sequence (possibly `eos`) with the reason. A device that is
    quick decodes some tokens at a time; of these steps only the last has logits, unless `logits`.
    """
    from ds4jax.engine.model_runner import Sampled

    waiting, free = iter(requests), list(range(runner.batch))
    running: dict[int, tuple[Request, int, int]] = {}  # slot → request, tokens so far, the last of them

    def advance(slot: int, request: Request, n: int, step: Sampled) -> Finish | None:
        room = runner.settings.ctx - len(request.tokens)
        finish = "stop" if step.token == eos else "length" if n >= min(request.max_tokens, room) else None
        if finish:
            running.pop(slot, None)
            free.append(slot)
        else:
            running[slot] = request, n, step.token
        return finish

    while True:
        while free and (request := next(waiting, None)):
            slot = free.pop(0)
            step = runner.prefill(slot, request.tokens, request.sampling)
            yield request, step, advance(slot, request, 1, step)
        if not running:
            return
        left = [min(r.max_tokens - n, runner.settings.ctx - runner.lengths[s]) for s, (r, n, _) in running.items()]
        size = 1 if logits else runner.block(min(left))
        block = runner.decode_block({slot: last for slot, (_, _, last) in running.items()}, size)
        tokens = block.tokens()
        for i in range(size):
            for slot in [slot for slot in tokens if slot in running]:
                step = Sampled(tokens[slot][i], block.batch_logits if i == size - 1 else None, slot)
                request, n, _ = running[slot]
                yield request, step, advance(slot, request, n + 1, step)
