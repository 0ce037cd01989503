"""A real HTTP server on loopback that speaks each provider's wire format.

It has a script, a queue of steps of which the last one repeats, and a history of the requests it got.
The path decides the dialect: `/v1/chat/completions` (OpenAI and compatible) or `/v1/messages`
(Anthropic). In a test:

    with Provider([failure(429, retry_after=1), answer("hello")]) as provider:
        ...base_url=provider.url...
        assert provider.requests[0].body["model"] == "m"

From another process: `python tests/fakes/providers.py --port-file F --script replies.json`, where the
script is a list of steps as objects: `[{"status": 429, "retry_after": 1}, {"text": "hello"}]`. The port
is written to F once the server listens; `GET /requests` returns the history, also as JSON.

Wire formats: https://platform.openai.com/docs/api-reference/chat/object,
https://platform.claude.com/docs/en/api/messages and each one's page on errors.
"""

from __future__ import annotations

import argparse
import json
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Step:
    """What happens to one request."""

    text: str = ""
    """The model's answer."""
    status: int = 200
    message: str = ""
    """The error's sentence, for a status of 400 and above. `{authorization}` becomes the key as it came."""
    retry_after: float | str | None = None
    body: str | None = None
    """Sent as it is, in place of the provider's format."""
    delay: float = 0.0
    """Seconds before the answer."""
    trickle: float = 0.0
    """Seconds between the bytes of the answer."""
    drop: bool = False
    """The connection is reset in place of an answer."""
    location: str | None = None
    """Where a redirect leads."""
    refuses_schema: bool = False
    """400 for a request with a schema, `text` for one without. A refusal does not use the step up."""
    usage: bool = True
    """Whether the answer counts tokens."""


def answer(text: str, **more: Any) -> Step:
    return Step(text=text, **more)


def failure(status: int, message: str = "it failed", **more: Any) -> Step:
    return Step(status=status, message=message, **more)


@dataclass(frozen=True)
class Request:
    """A request as it came. Header names are in lower case."""

    path: str
    headers: dict[str, str]
    body: Any

    @property
    def has_schema(self) -> bool:
        return "response_format" in self.body or "output_config" in self.body


@dataclass
class Provider:
    """The server; a context manager. `url` is what a user gives as `--base-url`."""

    script: Sequence[Step]
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self.closed = threading.Event()
        """Ends delays: no request outlives its test."""
        self._next = 0
        provider = self

        class Handler(_Handler):
            pass

        Handler.provider = provider
        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.02)

    def take(self, request: Request) -> Step:
        """The step for this request; both are counted under one lock."""
        with self._lock:
            self.requests.append(request)
            step = self.script[min(self._next, len(self.script) - 1)]
            if step.refuses_schema and request.has_schema:
                name = "response_format" if "response_format" in request.body else "output_config"
                return failure(400, f"{name}: json_schema is not supported by this model")
            self._next += 1
            return step


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle of an answer is part of the tests, and no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    provider: Provider

    def do_GET(self) -> None:
        history = json.dumps([asdict(request) for request in self.provider.requests])
        self._send(200, history)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        request = Request(self.path, {k.lower(): v for k, v in self.headers.items()}, json.loads(raw))
        step = self.provider.take(request)
        self.provider.closed.wait(step.delay)
        if step.drop:
            # SO_LINGER with 0 s: the peer sees a reset, not an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            # The reader holds the socket open, too.
            self.rfile.close()
            self.connection.close()
            return
        if step.body is not None:
            self._send(step.status, step.body, step)
        elif step.status >= 300:
            self._send(step.status, json.dumps(self._error(step)), step)
        elif self.path == "/v1/chat/completions":
            self._send(200, json.dumps(_completion(step, request)), step)
        elif self.path == "/v1/messages":
            self._send(200, json.dumps(_message(step, request)), step)
        else:
            self._send(404, json.dumps({"error": {"message": f"no such path: {self.path}"}}))

    def _error(self, step: Step) -> object:
        key = self.headers.get("authorization") or self.headers.get("x-api-key") or ""
        message = step.message.replace("{authorization}", key)
        if self.path == "/v1/messages":
            return {"type": "error", "error": {"type": "api_error", "message": message}, "request_id": "req_1"}
        return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}

    def _send(self, status: int, body: str, step: Step | None = None) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if step is not None and step.retry_after is not None:
            self.send_header("retry-after", str(step.retry_after))
        if step is not None and step.location is not None:
            self.send_header("location", step.location)
        self.end_headers()
        if step is not None and step.trickle:
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                self.provider.closed.wait(step.trickle)
        else:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 the name is the base class's
        """Nothing: a test's output is the test's."""


def _completion(step: Step, request: Request) -> dict[str, object]:
    body: dict[str, object] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_760_000_000,
        "model": f"{request.body['model']}-2026",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": step.text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }
    if step.usage:
        body["usage"] = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    return body


def _message(step: Step, request: Request) -> dict[str, object]:
    body: dict[str, object] = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": f"{request.body['model']}-2026",
        "content": [{"type": "thinking", "thinking": "...", "signature": "s"}, {"type": "text", "text": step.text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    if step.usage:
        body["usage"] = {"input_tokens": 11, "output_tokens": 7}
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat provider on loopback that follows a script.")
    parser.add_argument("--port-file", type=Path, required=True, help="where to write the port")
    parser.add_argument("--script", type=Path, required=True, help="a JSON list of steps")
    options = parser.parse_args()
    provider = Provider([Step(**step) for step in json.loads(options.script.read_text())])
    # Renamed into place: who waits for the file never reads half a number.
    unfinished = options.port_file.with_suffix(".unfinished")
    unfinished.write_text(str(provider.port))
    unfinished.replace(options.port_file)
    provider.serve()


if __name__ == "__main__":
    main()
