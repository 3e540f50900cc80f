"""Errors in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}`` with the matching status code."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match, Route

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(HTTPException):
    """A request that ends with an error.

    Arguments:
        status: HTTP status code.
        message: for people; names the offending value.
        param: the offending field of the request.
        code: short name for programs.
        headers: extra headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The body of a response, or of an in-band error in a stream."""
        return error_body(self.status_code, self.detail, self.param, self.code)

    def response(self) -> JSONResponse:
        """The error as an HTTP response."""
        return JSONResponse(self.body(), self.status_code, headers=self.headers)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error response."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, retry_after: float) -> ApiError:
    """Status 429: try again in ``retry_after`` seconds."""
    seconds = max(1, math.ceil(retry_after))
    return ApiError(429, message, code="engine_overloaded", headers={"Retry-After": str(seconds)})


def unavailable(message: str, code: str) -> ApiError:
    """Status 503: the server cannot accept requests."""
    return ApiError(503, message, code=code, headers={"Retry-After": "5"})


@contextlib.contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors speak of fields as a request's API calls them.

    Arguments:
        names: of the chat's fields.
    """
    try:
        yield
    except ApiError as error:
        param = error.param
        if param is not None and param in names:
            error.detail, error.param = error.detail.replace(param, names[param], 1), names[param]
        raise


def describe_problems(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """Pydantic's findings in one sentence, without repeating the client's data."""
    paths = [[str(part) for part in problem["loc"] if part != "body"] for problem in problems]
    if not paths[0]:  # a name of a field that is no text; all else has been seen to be an object
        return invalid(f"The body must be a JSON object: {problems[0]['msg']}.")
    param = paths[0][0]
    same_field = [problem["msg"] for path, problem in zip(paths, problems, strict=True) if path[:1] == [param]]
    reasons = "; or: ".join(dict.fromkeys(same_field[:4]))
    where = ".".join(paths[0][:4]) if len(same_field) == 1 else param
    # Keys come from the client and may not be encodable in UTF-8.
    where, param = (name[:100].encode("utf-8", "replace").decode() for name in (where, param))
    return invalid(f"{where}: {reasons}", param=param)


def install_error_handlers(app: FastAPI, routes: Sequence[Route]) -> None:
    """Return every error of the application, which has these routes, in OpenAI's format."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error, ApiError):
            return error.response()
        headers = dict(error.headers or {})
        if error.status_code == 405:  # several routes may share a path; Starlette names the methods of one
            matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
            methods = {method for route in matching for method in route.methods or ()}
            headers["Allow"] = ", ".join(sorted(methods)) or headers["Allow"]
        return JSONResponse(error_body(error.status_code, error.detail), error.status_code, headers=headers)

    async def on_invalid(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return describe_problems(error.errors()).response()

    app.add_exception_handler(HTTPException, on_api_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
