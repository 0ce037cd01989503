"""An engine behind an OpenAI-compatible API, on a real port, that streams tokens and misbehaves on demand.

In a test: `with Engine("cut") as engine: ... engine.url, engine.requests`. `tests/fakes/vllm_server.py` serves
the same in a process of its own. A mode `MODE:N` begins with request N, counted from 0.

The pieces are those of vLLM 0.32 and of llama.cpp's server, as both streamed them to a plain client.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import posix
import re
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CUDA_OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 50.00 MiB. GPU 0 has a total capacity of 23.56 GiB "
    "of which 21.75 MiB is free. Including non-PyTorch memory, this process has 23.50 GiB memory in use. Of the "
    "allocated memory 22.88 GiB is allocated by PyTorch, with 24.00 MiB allocated in private pools (CUDA Graphs), "
    "and 275.38 MiB is reserved by PyTorch but unallocated."
)
"""As vLLM's EngineCore logged it (github.com/noonghunna/club-3090, issue 16)."""


_DONE = b"\n\ndata: [DONE]"
ODD_PIECES = {
    "dict-choices": b'{"choices": {"text": "x"}}',
    "text-choices": b'{"choices": "x"}',
    "number-choice": b'{"choices": [7]}',
    "nested": b"[" * 100_000,
    "text-usage": b'{"usage": "many"}' + _DONE,
    "list-details": b'{"usage": {"completion_tokens": 6, "prompt_tokens": 8, "prompt_tokens_details": [1]}}' + _DONE,
    "infinite": b'{"usage": {"completion_tokens": 1e999, "prompt_tokens": 8}}' + _DONE,
    "no-time": b'{"usage": {"completion_tokens": 6, "prompt_tokens": 8}, "timings": {"prompt_ms": NaN}}' + _DONE,
}
"""Pieces that are JSON, or nearly, and not of the API."""


class Engine:
    """Serves in a thread; `requests` holds the bodies it got, in order of arrival."""

    handler: type

    def __init__(
        self,
        mode="ok",
        *,
        model="m",
        port=0,
        seats=64,
        token_seconds=0.0,
        metrics="",
        last_words=f"(EngineCore pid=112) ERROR 05-01 14:39:06 [core.py:1131] {CUDA_OUT_OF_MEMORY}",
        timed=False,
        pages=None,
        nats=9.68,
        native=None,
        forced=None,
        template_tokens=7,
    ):
        """`last_words`: its log when memory runs out; `timed`: it says how long both phases took, as llama.cpp does;
        `pages`: further paths with the JSON that they bring; `native`: answers `/generate` as SGLang does;
        `forced`: answers what is not streamed, and `/tokenize`, as llama.cpp does; `template_tokens`: of a chat."""
        self.mode, _, start = mode.partition(":")
        self.begins = int(start or 0)
        self.model, self.metrics, self.token_seconds = model, metrics, token_seconds
        self.last_words, self.timed, self.pages = last_words, timed, pages or {}
        self.nats, self.native, self.forced, self.template_tokens = nats, native, forced, template_tokens
        self.requests, self.headers, self.in_flight, self.most_in_flight = [], [], 0, 0
        self.lock = threading.Lock()
        self.seats = threading.Semaphore(seats)
        engine = self

        class Handler(self.handler):
            served = engine

        self.server = _Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that went away is no error of the server's."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Engine

    def log_message(self, *_):
        pass

    def reply(self, status, content, kind="application/json"):
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def error(self, status, message, kind="InternalServerError"):
        self.reply(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})

    def do_GET(self):
        served = self.served
        if self.path == "/health":
            self.reply(503 if served.mode == "unhealthy" else 200, "")
        elif self.path == "/v1/models":
            offered = {"two-models": ["m", "n"], "no-model": []}.get(served.mode, [served.model])
            if served.mode == "no-api":
                self.reply(200, "<html>hello</html>", "text/html")
            else:
                self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in offered]})
        elif self.path == "/version":
            self.reply(200, {"version": "0.32.0"})
        elif self.path == "/metrics":
            self.reply(200, served.metrics, "text/plain")
        elif self.path in served.pages:
            self.reply(200, served.pages[self.path])
        else:
            self.error(404, "Not Found", "NotFoundError")

    def do_POST(self):
        served = self.served
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.left = False
        with served.lock:
            number = len(served.requests)
            served.requests.append({"path": self.path, "at": time.perf_counter(), **asked})
            served.headers.append(dict(self.headers))
            served.in_flight += 1
            served.most_in_flight = max(served.most_in_flight, served.in_flight)
        try:
            with served.seats:
                self.answer(asked, number, served.mode if number >= served.begins else "ok")
        finally:
            self.leave()

    def leave(self):
        """Before the last byte: the client sends its next request as soon as it has that."""
        with self.served.lock:
            self.served.in_flight -= not self.left
            self.left = True

    def answer(self, asked, number, mode):
        if self.served.forced and not asked.get("stream"):
            return self.reply_of(self.served.forced, asked, mode)
        if self.path == "/tokenize":
            return self.tokenize(asked, mode)
        if self.path == "/generate" and self.served.native:
            return self.reply_of(self.served.native, asked, mode)
        if asked["model"] != self.served.model:
            return self.error(404, f"The model `{asked['model']}` does not exist.", "NotFoundError")
        chat = self.path.endswith("/chat/completions")
        if mode == "chat-only" and not chat:
            return self.error(404, "Not Found", "NotFoundError")
        prompt = asked["messages"][0]["content"] if chat else asked["prompt"]
        if mode == "text-only" and isinstance(prompt, list):
            return self.error(400, "prompt: expected a string", "BadRequestError")
        if mode in ("strict", "strict-no-usage") and "ignore_eos" in asked:
            return self.error(400, "Unrecognized request argument supplied: ignore_eos", "invalid_request_error")
        if mode == "500" or (mode == "every-other" and number % 2):
            return self.error(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")
        if mode == "400":
            return self.error(400, "This model's maximum context length is 48 tokens.", "BadRequestError")
        if mode == "401":
            return self.error(401, "Unauthorized", "Unauthorized")
        if mode == "403":
            return self.error(403, "Forbidden", "Forbidden")
        if mode == "html":
            return self.reply(200, "<html>It works!</html>", "text/html")
        if mode == "not-streaming":
            return self.reply(200, {"object": "text_completion", "choices": [{"text": "all at once"}]})
        if mode == "hang":
            time.sleep(3)
            return None
        if mode == "reset":
            self.close_connection = True
            return None
        if mode == "out-of-memory":
            sys.stderr.write(f"{self.served.last_words}\n")
            self.error(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")
            posix._exit(1)  # coverage's own os._exit would write files while other threads run
        if mode == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.stream(asked, chat, prompt, mode) if asked.get("stream") else self.at_once(asked, prompt, mode)

    def tokenize(self, asked, mode):
        """As vLLM 0.32: a word or a mark is a token here."""
        if mode == "no-tokenizer":
            return self.error(500, "Unable to get tokenizer because `skip_tokenizer_init=True`", "InternalServerError")
        words = re.findall(r"\w+|[^\w\s]", asked["prompt"])
        tokens = [1000 + int(hashlib.sha256(word.encode()).hexdigest(), 16) % 1000 for word in words]
        tokens = tokens if mode != "few-tokens" else tokens[:5]
        return self.reply(200, {"count": len(tokens), "max_model_len": 4096, "tokens": tokens, "token_strs": None})

    def reply_of(self, engine, asked, mode):
        """What the stand-in of an engine says to a request that is not streamed."""
        if mode == "reset-unstreamed":
            self.close_connection = True
            return None
        answer = engine(asked, mode)
        self.leave()
        return self.reply(200, answer)

    def at_once(self, asked, prompt, mode):
        """Prompts of token ids or a text, each with its own answer, as vLLM 0.32 gives them; or a chat's."""
        if mode == "reset-unstreamed":
            self.close_connection = True
            return None
        prompts = prompt if isinstance(prompt[0], list) else [prompt]
        choices = []
        for index, ids in enumerate(prompts):
            choice = {"index": index, "text": "x" * asked["max_tokens"], "finish_reason": "length", "logprobs": None}
            choice |= {"stop_reason": None, "token_ids": None, "prompt_logprobs": None, "prompt_token_ids": None}
            if asked.get("return_token_ids") and mode != "no-token-ids":
                choice |= {"token_ids": [2000 + i for i in range(asked["max_tokens"])], "prompt_token_ids": ids}
            if asked.get("prompt_logprobs") is not None and mode != "no-logprobs":
                # Beside the token itself its rank and text; nothing is known of the first one.
                logprob = {"nan": None, "impossible": -9999.0}.get(mode, -self.served.nats)
                told = {"logprob": logprob, "rank": 7, "decoded_token": "x"}
                choice["prompt_logprobs"] = [None, *({str(i): told} for i in ids[1:])]
                if mode == "other-tokens":
                    choice["prompt_logprobs"] = [None, *({"1": told} for _ in ids[1:])]
            if self.path.endswith("/chat/completions"):
                choice["message"] = {"role": "assistant", "content": choice.pop("text")}
            choices.append(choice)
        time.sleep(self.served.token_seconds * asked["max_tokens"])
        if mode == "one-choice":
            choices = choices[:1]
        usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": asked["max_tokens"] * len(prompts)}
        self.leave()
        return self.reply(200, {"id": "cmpl-1", "object": "text_completion", "choices": choices, "usage": usage})

    def stream(self, asked, chat, prompt, mode):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        began = time.perf_counter()
        count = asked["max_tokens"] - (mode == "short")
        words = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        # A word of this tokenizer's is two tokens.
        tokens = words if isinstance(prompt, list) else 2 * words + self.served.template_tokens * chat
        if chat:
            self.event(
                {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
            )
        if mode in ODD_PIECES:
            self.chunk(b"data: " + ODD_PIECES[mode] + b"\n\n")
            return
        at_once = 2 if mode == "pairs" else 1
        for index in itertools.count() if mode == "endless" else range(0, count, at_once):
            time.sleep(self.served.token_seconds)
            if mode == "stall" and index >= count // 2:
                # Comments keep a connection open and say nothing.
                for _ in range(60):
                    self.chunk(b": still here\n\n")
                    time.sleep(0.05)
                return
            if mode == "cut" and index >= count // 2:
                self.wfile.write(b"0\r\n\r\n")
                return
            if mode == "broken-chunk" and index >= count // 2:
                self.close_connection = True
                return
            if mode == "error-event":
                self.event({"error": {"message": "EngineCore died", "code": 500}})
                return
            if mode == "garbage":
                self.chunk(b"data: hello\n\n")
                return
            text = "x" * at_once
            end = "length" if index + at_once >= count else None
            piece = {"delta": {"content": text}} if chat else {"text": text}
            self.event({"choices": [{"index": 0, **piece, "finish_reason": end}], "usage": None})
        if mode not in ("no-usage", "strict-no-usage"):
            usage = {"prompt_tokens": tokens + (mode == "miscounts"), "completion_tokens": count}
            if mode == "template-cached":
                # vLLM's cache holds blocks of 16 tokens.
                usage["prompt_tokens_details"] = {"cached_tokens": self.served.template_tokens // 16 * 16}
            if mode in ("cached", "chat-cached"):
                usage["prompt_tokens_details"] = {"cached_tokens": tokens - 1}
            if mode == "odd-usage":
                usage = {"tokens": 3}
            last = {"choices": [], "usage": usage}
            if mode == "timings":
                last["timings"] = {"prompt_ms": 12.5, "predicted_ms": 30.0}
            if self.served.timed:
                half = (time.perf_counter() - began) * 500
                last["timings"] = {"prompt_n": tokens, "prompt_ms": half, "predicted_n": count, "predicted_ms": half}
            self.event(last)
        self.leave()
        self.chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, piece):
        self.chunk(f"data: {json.dumps({'id': 'cmpl-1', 'model': self.served.model, **piece})}\n\n".encode())

    def chunk(self, data):
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


Engine.handler = _Handler
