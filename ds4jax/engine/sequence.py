"""One request on its way through the engine: its tokens, its slot, and how far it has come. No JAX."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from ds4jax.engine.keys import key_of
from ds4jax.engine.types import Event, Request

if TYPE_CHECKING:
    from ds4jax.engine.constraints import Constraints
    from ds4jax.engine.prefix_cache import Snapshot
    from ds4jax.engine.snapshot import Planes


def _ignore(event: Event) -> None:
    pass


@dataclasses.dataclass(eq=False, kw_only=True)
class Sequence:
    """The tokens of a prompt and of its answer so far.

    It waits until it has a slot, then its prompt is prefilled, then it decodes.

    request: what was asked. limit: number of tokens, prompt and answer, at which it ends. stop_ids: tokens that end it.
    constraints: how its logits are edited, or None if they are not. emit: takes its events.
    tokens: ids, first those of the prompt. prompt_len: how many these are. key: the prompt's, see `ds4jax.engine.keys`.
    slot: where its state is, or None while it waits. computed: tokens whose state the slot holds, or `suspended`.
    """

    request: Request = dataclasses.field(kw_only=False)
    limit: int = 2**31
    stop_ids: frozenset[int] = frozenset()
    constraints: Constraints | None = None
    emit: Callable[[Event], None] = _ignore

    tokens: list[int] = dataclasses.field(init=False)
    prompt_len: int = dataclasses.field(init=False)
    key: bytes = dataclasses.field(init=False)
    slot: int | None = None
    computed: int = 0

    # Scheduling. arrival: its number. known: tokens of the prompt that need not be computed, as was found when it came.
    # passed: how many others got a slot in its place since it last computed. begun_at: `computed` when it got its slot.
    # suspended: its state, while it waits to go on.
    arrival: int = 0
    known: int = 0
    passed: int = 0
    begun_at: int = 0
    suspended: Snapshot | None = None

    # Prefix reuse. marks: positions in the prompt at which a chunk has to end, for a snapshot. deferred_mark: one whose
    # snapshot is made from that of the whole prompt, or 0. leader: the sequence whose prompt this one waits for.
    marks: set[int] = dataclasses.field(default_factory=set)
    deferred_mark: int = 0
    leader: Sequence | None = None
    # disk_read: of a snapshot to start from. base: the snapshot it starts from. latest: the last one taken of it.
    disk_read: Future[Snapshot | None] | None = None
    base: Snapshot | None = None
    latest: Snapshot | None = None
    # What the slot held besides compressed rows at the deferred mark; and, by position, at the last two multiples of
    # 128 in the answer.
    mark_state: Planes | None = None
    tails: collections.deque[tuple[int, Planes]] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=2)
    )

    # Times, of `time.perf_counter`; token_at: of the last token. cached: tokens of the prompt that did not have to be
    # computed.
    submitted_at: float = dataclasses.field(default_factory=time.perf_counter)
    started_at: float | None = None
    first_token_at: float | None = None
    token_at: float = 0.0
    cached: int = 0

    def __post_init__(self):
        self.tokens = [int(token) for token in self.request.tokens]
        self.prompt_len, self.key = len(self.tokens), key_of(self.tokens)

    @property
    def client(self) -> str:
        """Who asked."""
        return self.request.client

    @property
    def held_slot(self) -> int:
        """The slot of a sequence that has one."""
        assert self.slot is not None
        return self.slot
