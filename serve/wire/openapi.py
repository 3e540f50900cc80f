"""Entries of routes in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def answer_or_stream(answer: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entry of an answer that may be streamed as server-sent events."""
    return {200: {"model": answer, "content": {"text/event-stream": {}}}}
