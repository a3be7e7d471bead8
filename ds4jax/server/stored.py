"""Stored responses, which can be fetched, continued and deleted: notes in the log that also keeps tool calls."""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from ds4jax.server.errors import ApiError
from ds4jax.server.replay import NoteLog

MAX_REFERENCED = 8 << 20
"""Characters of JSON of all items that an input names by reference, each as often as it is named."""

type Json = dict[str, Any]


class Stored:
    """Responses by id, each with what was new in its input. Thread-safe; those used longest ago may be forgotten."""

    def __init__(self, notes: NoteLog):
        self._notes = notes

    def keep(self, response: Json, items: list[Json]) -> None:
        """Keep a response and the input items that it answers, those of earlier responses apart."""
        items = [_in_parts(item) | {"id": _id_of(item)} for item in items]
        for item in [*items, *response["output"]]:
            self._notes.put(f"item:{item['id']}", response["id"])
        self._notes.put(f"response:{response['id']}", {"response": response, "input": items})

    def response(self, id: str) -> Json:
        """Raises ApiError if it is not kept."""
        return self._note(id)["response"]

    def page(self, id: str, query: Mapping[str, str]) -> tuple[list[Json], bool]:
        """Some of the input items that were new then, and whether there are more. Raises ApiError.

        query: `order`, desc (from the last one, the default) or asc; `limit`, 1 to 100, by default 20; `after`, the id
        of the item before the first. As OpenAI's API has them.
        """
        items = self._note(id)["input"]
        if (order := query.get("order", "desc")) not in ("asc", "desc"):
            raise ApiError(f"order: found {order!r:.80}, expected asc or desc", param="order")
        asked = query.get("limit", "20")
        if not asked.isdecimal() or len(asked) > 3 or not 1 <= (limit := int(asked)) <= 100:
            raise ApiError(f"limit: found {asked!r:.80}, expected 1 to 100", param="limit")
        if order == "desc":
            items = items[::-1]
        if (after := query.get("after")) is not None:
            at = next((i for i, item in enumerate(items) if item["id"] == after), None)
            if at is None:
                raise ApiError(f"after: found {after!r:.80}, expected the id of one of the items", param="after")
            items = items[at + 1 :]
        return items[:limit], len(items) > limit

    def delete(self, id: str) -> None:
        """Raises ApiError if it is not kept."""
        self._note(id)
        self._notes.put(f"response:{id}", None)

    def history(self, previous: str) -> list[Json]:
        """Input and output up to the end of a response, in order. Raises ApiError if a part of it is not kept."""
        turns = []
        while previous is not None:
            if (note := self._notes.get(f"response:{previous}")) is None:
                text = f"previous_response_id: found {previous!r:.80}, expected that of a response that is stored"
                raise ApiError(text, param="previous_response_id", code="previous_response_not_found")
            turns.append([*note["input"], *note["response"]["output"]])
            previous = note["response"]["previous_response_id"]
        return [item for turn in reversed(turns) for item in turn]

    def resolved(self, items: list[Any]) -> Iterator[Any]:
        """The items, with those that are named by id in the place of their references. Raises ApiError."""
        look_up, total = functools.cache(self._item), 0
        for i, item in enumerate(items):
            if isinstance(item, dict) and (item.get("type") == "item_reference" or item.keys() == {"id"}):
                where, id = f"input[{i}].id", item.get("id")
                stored = look_up(id) if isinstance(id, str) else None
                if stored is None:
                    raise ApiError(f"{where}: found {id!r:.80}, expected the id of an item that is stored", param=where)
                item, size = stored
                total += size
                if total > MAX_REFERENCED:
                    text = f"input: found items of more than {MAX_REFERENCED} characters by reference"
                    raise ApiError(f"{text}, expected at most that", 413, param="input")
            yield item

    def _item(self, id: str) -> tuple[Json, int] | None:
        """An item that is stored, and how many characters of JSON it is."""
        note = self._notes.get(f"response:{self._notes.get(f'item:{id}')}")
        items = [*note["input"], *note["response"]["output"]] if note else []
        return next(((item, len(json.dumps(item))) for item in items if item["id"] == id), None)

    def _note(self, id: str) -> Json:
        if (note := self._notes.get(f"response:{id}")) is None:
            raise ApiError(f"found no response {id:.80}", 404)
        return note


def _id_of(item: Json) -> str:
    return id if isinstance(id := item.get("id"), str) and id else f"item_{secrets.token_hex(12)}"


def _in_parts(item: Json) -> Json:
    """An item as it is shown: the text of a message is a list of parts."""
    if item.get("type", "message") != "message" or not isinstance(text := item.get("content"), str):
        return item
    kind = "output_text" if item["role"] == "assistant" else "input_text"
    return item | {"type": "message", "content": [{"type": kind, "text": text}]}
