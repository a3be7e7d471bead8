"""An engine without a model: it plays scripted answers, for tests of what lies above; and a server around an engine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator

from ds4jax.engine.counters import Histogram
from ds4jax.engine.grammar import Grammar, Vocabulary
from ds4jax.engine.sequence import Sequence
from ds4jax.engine.stream import Stream
from ds4jax.engine.types import Failed, Finished, Prefilled, Request, Scored, Started, Token
from ds4jax.io.tokenizer import Special, byte_tokenizer
from ds4jax.profile import choose
from ds4jax.server.app import Options, make_app
from ds4jax.server.connections import Limits, Server
from ds4jax.tools.serve import bind

TOKENIZER = byte_tokenizer()
_SPECIALS = re.compile("(" + "|".join(re.escape(special.value) for special in Special) + ")")

CALL = """<｜DSML｜tool_calls>
<｜DSML｜invoke name="weather">
<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls>"""


def ids(text: str) -> list[int]:
    """Token ids of text in which control tokens are spelled."""
    parts = _SPECIALS.split(text)
    return TOKENIZER.encode_segments(TOKENIZER.special(Special(p)) if i % 2 else p for i, p in enumerate(parts) if p)


class FakeEngine:
    """Answers each request with `script(request)`: text with control tokens spelled, EOS added unless the text ends
    in "…"; an exception is raised by the stream.

    chunks: of the prefill. delay: seconds before the first event, each chunk and each token. cached: tokens.
    real_grammars: forms are compiled; else a request has them as they are.
    Attributes: requests (all of them), running (streams that are neither finished nor cancelled).
    """

    def __init__(
        self,
        script: Callable[[Request], str | Exception],
        *,
        ctx: int = 4096,
        chunks: int = 1,
        delay: float = 0.0,
        cached: int = 0,
        real_grammars: bool = False,
        profile: str = "auto",
    ):
        self.script, self.ctx, self._chunks, self._delay, self._cached = script, ctx, chunks, delay, cached
        self.tokenizer, self.model_name, self.profile = TOKENIZER, "fake", choose(profile, {}, "")
        self.device = "no device"
        self.requests: list[Request] = []
        self.running: set[Stream] = set()
        self.closed = self.failed = self.full = False
        self.problem = self.hang = ""
        self.kv_store = None
        self._vocabulary = Vocabulary(TOKENIZER) if real_grammars else None

    def submit(self, request: Request) -> Stream:
        self.requests.append(request)
        stream = Stream(self.running.discard)
        self.running.add(stream)
        asyncio.get_running_loop().create_task(self._play(request, stream))
        return stream

    async def _play(self, request: Request, stream: Stream) -> None:
        for event in self._events(request):
            await asyncio.sleep(self._delay)
            if stream not in self.running:
                return
            stream.push(event)
        self.running.discard(stream)

    def _events(self, request: Request) -> Iterator:
        text = self.script(request)
        if isinstance(text, Exception):
            yield Failed(text)
            return
        n = len(request.tokens)
        yield Started(min(self._cached, n), n)
        for i in range(self._chunks):
            yield Prefilled(n * (i + 1) // self._chunks, n)
        if (top := request.prompt_logprobs) is not None:
            yield Scored(tuple(Token(id, -1.5, ((66, -0.25), (id, -1.5))[:top]) for id in request.tokens[1:]))
        answer = ids(text) if text.endswith("…") else [*ids(text), TOKENIZER.eos_id]
        ends = request.stop_ids or {TOKENIZER.eos_id}
        answer = answer[: next((i + 1 for i, id in enumerate(answer) if id in ends), None)]
        for id in answer[: request.max_tokens]:
            top = () if request.logprobs is None else ((id, -0.5), (65, -2.0))[: request.logprobs]
            yield Token(id, None if request.logprobs is None else -0.5, top)
        yield Finished("stop" if len(answer) <= request.max_tokens and answer[-1] in ends else "length")

    @staticmethod
    def said(request: Request) -> str:
        """The user's last message in the prompt of a request."""
        return TOKENIZER.decode(request.tokens).rpartition("<｜User｜>")[2].partition("<｜Assistant｜>")[0]

    def slots(self) -> list:
        return [None, Sequence(self.requests[-1]) if self.requests else None]

    def metrics(self) -> dict:
        first = Histogram("First tokens", (0.1, 1.0))
        first.observe(0.5)
        state = {"waiting": 0, "decoding": len(self.running), "generated_tokens": 7}
        drafts = {"draft_tokens": 2, "drafts_by_place": [(9, 7), (7, 3)]}
        return state | drafts | {"histograms": {"time_to_first_token_seconds": first}}

    def grammar(self, form, begin):
        return (form, begin) if self._vocabulary is None else Grammar(self._vocabulary, form, begin)

    async def close(self, grace: float = 0.0, save: bool = True) -> None:
        self.closed = True


@contextlib.contextmanager
def serving(engine, options: Options | None = None, limits: Limits | None = None) -> Iterator[str]:
    """The address of a server of `engine`, in a thread of its own for as long as the block runs."""
    listener = bind("127.0.0.1", 0)
    server = Server(make_app(engine, options), listener, limits, close=engine.close)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        for _ in itertools.takewhile(lambda _: not server.started and thread.is_alive(), itertools.count()):
            threading.Event().wait(0.01)
        yield url
    finally:
        server.should_exit = True
        thread.join()


def wait_until_idle(engine: FakeEngine) -> None:
    """Wait until no stream of it runs. Fails after 10 s."""
    deadline = time.monotonic() + 10
    while engine.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
