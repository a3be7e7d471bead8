"""Errors as a client sees them: a status, and the error object of the API that was called."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ds4jax.engine.types import ContextOverflow, EngineFailed, Overloaded, StepFailed, Stopping, TooMany
from ds4jax.errors import Ds4Error

log = logging.getLogger(__name__)

# status: error type of OpenAI's APIs, of Anthropic's
_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("invalid_request_error", "authentication_error"),
    403: ("invalid_request_error", "permission_error"),
    404: ("invalid_request_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    421: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("server_error", "overloaded_error"),
}
MAX_MESSAGE = 500  # characters: an error may quote what it found
_PATH = re.compile(r"[A-Za-z_][\w.\[\]]*(?=: )")  # the beginning of most messages of a Ds4Error


class ApiError(Ds4Error):
    """An error that is sent to the client.

    param: the part of the body that is wrong, as a path. code: OpenAI's name for this very error.
    """

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @classmethod
    def of(cls, error: BaseException) -> ApiError:
        """Turn any exception into an ApiError. One that is not the client's fault is logged."""
        match error:
            case ApiError():
                return error
            case ContextOverflow():
                return overflow(error.prompt, error.ctx)
            case Overloaded() | Stopping():
                return cls(str(error), 503, code="overloaded" if isinstance(error, Overloaded) else "stopping")
            case TooMany():
                return cls(str(error), 429, code="rate_limit_exceeded")
            case StepFailed():
                return cls(str(error), 500, code="step_failed")
            case Ds4Error() if not isinstance(error, EngineFailed):
                path = _PATH.match(str(error))
                return cls(str(error)[:MAX_MESSAGE], param=path[0] if path else None)
        log.error("a request failed", exc_info=error)
        return cls("the server failed; its log says how", 500)

    def openai(self) -> dict[str, Any]:
        kind = _TYPES[self.status][0]
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        return {"type": "error", "error": {"type": _TYPES[self.status][1], "message": self.message}}

    def response(self, anthropic: bool = False) -> Response:
        """The answer to the client, in OpenAI's form or in Anthropic's."""
        content = json.dumps(self.anthropic() if anthropic else self.openai())
        headers = {401: {"www-authenticate": "Bearer"}, 408: {"connection": "close"}}
        headers |= dict.fromkeys((429, 503), {"retry-after": "1"})
        return Response(content, self.status, headers.get(self.status), media_type="application/json")


def overflow(prompt: int, ctx: int, note: str = "") -> ApiError:
    """The error for a prompt that leaves no room for an answer. Coding agents look for these words, or for the code."""
    text = f"prompt is too long: {prompt} tokens > {ctx - 1} maximum{note}"
    return ApiError(text, param="messages", code="context_length_exceeded")


def respond(request: Request, error: ApiError) -> Response:
    """The error in Anthropic's form for its paths and its clients, else in OpenAI's."""
    theirs = "/messages" in request.scope["path"] or "anthropic-version" in request.headers
    return error.response(theirs)
