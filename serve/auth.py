"""API keys: hashed at startup, compared in constant time, required on every path but the open ones."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError

MESSAGES_PATH = "/v1/messages"  # whose clients send their key in a header of its own
OPERATOR_PATHS = frozenset({"/metrics", "/v1/contracts/reload"})


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who sent a request. ``key_id`` is None when the server has no keys; it is safe to log."""

    key_id: str | None = None
    operator: bool = False

    def cache_salt(self, client_salt: str | None) -> str | None:
        """The salt of the caller's prefix cache. Callers with different keys never share pages, so that the time to the
        first token reveals nothing about other callers' prompts."""
        if self.key_id is None:
            return client_salt
        return hashlib.sha256(f"{self.key_id}\0{client_salt or ''}".encode()).hexdigest()


class KeyRing:
    """The server's API keys.

    Arguments:
        api_keys: keys of ordinary callers; without any, everyone may call.
        admin_key: key that is valid for the operator's paths as well; ordinary keys then are not.
    """

    def __init__(self, api_keys: Sequence[str], admin_key: str | None = None) -> None:
        self._digests = [(_digest(key), Caller(key_id=_key_id(key), operator=admin_key is None)) for key in api_keys]
        if admin_key is not None:
            self._digests.append((_digest(admin_key), Caller(key_id=_key_id(admin_key), operator=True)))

    @property
    def required(self) -> bool:
        """Whether a key is needed at all."""
        return bool(self._digests)

    def identify(self, authorization: str | None, api_key: str | None = None) -> Caller | None:
        """The caller of an ``Authorization`` header, else of an ``x-api-key``; None if its key is not valid."""
        scheme, _, key = (f"Bearer {api_key or ''}" if authorization is None else authorization).partition(" ")
        presented = _digest(key.strip())
        found = None
        for digest, caller in self._digests:  # all of them, so that timing reveals nothing
            if hmac.compare_digest(digest, presented):
                found = caller
        return found if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _key_id(key: str) -> str:
    # A second hash: the id appears in logs and must not help anyone who also gets hold of the digests.
    return hashlib.sha256(b"key id\0" + _digest(key)).hexdigest()[:12]


class Authentication:
    """ASGI middleware that refuses callers without a valid key and stores the others in the request's state."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            caller = Caller(operator=True)
            if self._keys.required and scope["path"] not in self._open_paths:
                headers = Headers(scope=scope)
                own = headers.get("x-api-key") if scope["path"].startswith(MESSAGES_PATH) else None
                found = self._keys.identify(headers.get("authorization"), own)
                if found is None:
                    message = "Missing or wrong API key. Send it as 'Authorization: Bearer KEY'."
                    challenge = {"WWW-Authenticate": "Bearer"}
                    error = ApiError(401, message, code="invalid_api_key", headers=challenge)
                    return await error.response()(scope, receive, send)
                if scope["path"] in OPERATOR_PATHS and not found.operator:
                    error = ApiError(403, f"{scope['path']} needs the operator's key.", code="operator_key_required")
                    return await error.response()(scope, receive, send)
                caller = found
            scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)
