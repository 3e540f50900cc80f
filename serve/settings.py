"""Settings of the server: address, access, limits of a request."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from ..dynamic.engine.quality import Quality
from ..kernels.api.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for. A request beyond a limit is refused: with status 413 or 431 for its size, 408 for
    its slowness, 429 for those beside it, 400 for all else.

    Arguments:
        max_prompts: prompts in one completion request.
        max_n: completions per prompt.
        max_choices: completions in one answer, over all its prompts.
        max_stop, max_stop_length: stop strings, and characters in one of them.
        max_stop_token_ids: token ids that end the output.
        max_logprobs: alternatives per position, for the output and for the prompt.
        max_logprob_entries: alternatives in one answer, over all positions; each takes some 200 bytes of memory.
        max_logit_bias: entries of ``logit_bias``.
        max_messages, max_tools: messages in one chat, and tools.
        max_tokens: cap on the output's length; None leaves it to the model's maximum length.
        max_text_characters: characters in one text that is tokenised.
        max_body_bytes, max_header_bytes: size of a request.
        max_json_values, max_json_depth: values in a body, and how deep they are nested.
        max_bodies_bytes: bodies of all requests in flight together. Beyond it unfinished ones end, the oldest first; a
            body for which the finished ones leave no room gets 429.
        header_timeout, body_timeout: seconds a client may take to send a header, a body.
        write_timeout: seconds in which a client must take what its connection holds, which is at most some 350 KiB.
        max_open_requests: requests in flight; beyond it the answer is 429.
        max_stored_responses, max_stored_bytes: responses that are kept for their clients, and their size as JSON.
        max_connections: open connections. Beyond it, or beyond what the limit on open files allows, those end that have
            kept the server waiting longest.
    """

    max_prompts: int = 128
    max_n: int = 16
    max_choices: int = 256
    max_stop: int = 16
    max_stop_length: int = 256
    max_stop_token_ids: int = 64
    max_logprobs: int = 20
    max_logprob_entries: int = 1_000_000
    max_logit_bias: int = 300
    max_messages: int = 2048
    max_tools: int = 128
    max_tokens: int | None = None
    max_text_characters: int = 1_000_000
    max_body_bytes: int = 4 * 1024 * 1024
    max_header_bytes: int = 16 * 1024
    max_json_values: int = 1_000_000
    max_json_depth: int = 64
    max_bodies_bytes: int = 64 * 1024 * 1024
    header_timeout: float = 20.0
    body_timeout: float = 60.0
    write_timeout: float = 30.0
    max_open_requests: int = 1024
    max_stored_responses: int = 1024
    max_stored_bytes: int = 64 * 1024 * 1024
    max_connections: int = 2048

    def __post_init__(self) -> None:
        check_ranges(self, *(item.name for item in fields(self)), where="server.limits.", above=0)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How the server runs.

    Arguments:
        host, port: where it listens; port 0 takes a free one.
        uds: path of a UNIX socket to listen on instead.
        served_model_name: name that clients use; None takes the model's own.
        api_keys: when there are any, every path but ``/health`` and ``/ping`` needs one (``Authorization: Bearer
            KEY``).
        api_keys_file: file with one more key per line; keeps them out of the list of processes.
        admin_key: key for ``/metrics`` and for new certificates, which ordinary keys then no longer open.
        public_page: with keys set, serve the page at ``/`` without one. It holds no data; its requests need a key.
        playground: serve the page at ``/``.
        cors_origins: web origins whose scripts may call the server; none by default.
        allowed_hosts: host names under which clients may call the server, ``*.example.com`` for all below one. Without
            any, a server without keys on the loopback interface allows that interface's names, every other all names.
        min_priority: earliest priority that a request may ask for; lower ones count as this one.
        drain_timeout: seconds that running requests get to finish after SIGTERM.
        hang_timeout: seconds without progress, while there is work, after which the engine counts as hung.
        text_threads: threads that tokenise; large texts and chat templates have one each of their own.
        default_alpha, default_delta: contract of requests without ``quality``; without an alpha they run exactly.
        warm_up: run one tiny request before the server reports that it is ready.
        log_format: ``text`` or ``json``, one line per request.
        limits: what one request may ask for.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    served_model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    api_keys_file: str | None = None
    admin_key: str | None = None
    public_page: bool = False
    playground: bool = True
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    min_priority: int = 0
    drain_timeout: float = 30.0
    hang_timeout: float = 300.0
    text_threads: int = 2
    default_alpha: float | None = None
    default_delta: float = 0.05
    warm_up: bool = True
    log_format: str = "text"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        object.__setattr__(self, "api_keys", tuple(self.api_keys))
        object.__setattr__(self, "cors_origins", tuple(self.cors_origins))
        object.__setattr__(self, "allowed_hosts", tuple(self.allowed_hosts))
        check_ranges(self, "port", where="server.", least=0, most=65535)
        check_ranges(self, "drain_timeout", where="server.", least=0)
        check_ranges(self, "hang_timeout", "text_threads", where="server.", above=0)
        check_ranges(self, "default_alpha", "default_delta", where="server.", above=0, below=1)
        if self.log_format not in ("text", "json"):
            raise ValueError(f"server.log_format must be text or json, not {self.log_format!r}")
        if any(not key.strip() for key in self.api_keys) or self.admin_key == "":
            raise ValueError("server.api_keys and server.admin_key must not be empty strings")
        if self.admin_key is not None and not (self.api_keys or self.api_keys_file):
            raise ValueError("server.admin_key needs server.api_keys: without them every path is open")

    @property
    def default_quality(self) -> Quality | None:
        """The contract of requests without ``quality``."""
        return None if self.default_alpha is None else Quality(alpha=self.default_alpha, delta=self.default_delta)

    def all_api_keys(self) -> tuple[str, ...]:
        """The keys given directly and those in ``api_keys_file``.

        Raises:
            ValueError: the file cannot be read or holds no key.
        """
        if self.api_keys_file is None:
            return self.api_keys
        try:
            lines = Path(self.api_keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"server.api_keys_file {self.api_keys_file!r} cannot be read: {error}") from error
        keys = tuple(line.strip() for line in lines if line.strip())
        if not keys:
            raise ValueError(f"server.api_keys_file {self.api_keys_file!r} holds no key")
        return self.api_keys + keys
