"""A stand-in for the `ollama` executable: its variables, log and native API; FAKE_OLLAMA says how it fails.

As in Ollama 0.31 and later, a model is loaded by the first request that needs it, again when its options differ, and
the log then holds the llama-server's own lines; FAKE_OLLAMA_ERA=old gives those of the runner before. Stricter than
Ollama in two things: an option or a variable that it does not know is an error, not a warning. `list` and `create` ask
the server at OLLAMA_HOST, as Ollama's client does.
"""

import http.client
import json
import os
import posix
import re
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from launcher import fail, leave_note, say, serve
from openai_server import Engine

NOTE = "FAKE_OLLAMA_NOTE"
VARIABLES = {
    "OLLAMA_HOST",
    "OLLAMA_KEEP_ALIVE",
    "OLLAMA_MAX_LOADED_MODELS",
    "OLLAMA_MAX_QUEUE",
    "OLLAMA_MODELS",
    "OLLAMA_NOPRUNE",
    "OLLAMA_NO_CLOUD",
    "OLLAMA_LOAD_TIMEOUT",
    "OLLAMA_CONTEXT_LENGTH",
    "OLLAMA_NUM_PARALLEL",
    "OLLAMA_FLASH_ATTENTION",
    "OLLAMA_KV_CACHE_TYPE",
}
OPTIONS = {"num_batch", "num_thread", "num_gpu", "num_ctx"}
PER_REQUEST = {"temperature", "seed", "repeat_penalty", "stop", "num_predict"}
MODEL = {
    "name": "tiny:latest",
    "model": "tiny:latest",
    "size": 2_000_000,
    "digest": "b0cddd6b904ccf969c9168068e3b66b6c9b66f6b0b77c2c0d6da2311dc8b9ff2",
    "details": {"format": "gguf", "family": "llama", "parameter_size": "0.2M", "quantization_level": "Q4_0"},
}
INFO = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 2,
}
STAMP = "time=2026-11-25T11:00:19.001Z level=INFO"


def variable(name, usual):
    return os.environ.get(name) or usual


def load_log(options):
    """What is logged when a model is loaded."""
    slots, context = int(variable("OLLAMA_NUM_PARALLEL", "1")), options.get("num_ctx", 4096)
    flash = {"1": "on", "0": "off"}.get(os.environ.get("OLLAMA_FLASH_ATTENTION", ""), "auto")
    cache, batch = variable("OLLAMA_KV_CACHE_TYPE", ""), options.get("num_batch", 512)
    threads = options.get("num_thread", 2)
    if os.environ.get("FAKE_OLLAMA_ERA") == "old":
        attention = {"on": "Enabled", "off": "Disabled", "auto": "Auto"}[flash]
        yield (
            f'{STAMP} source=runner.go:895 msg=load request="{{Operation:commit LoraPath:[] Parallel:{slots} '
            f"BatchSize:{batch} FlashAttention:{attention} KvSize:{context * slots} KvCacheType:{cache} "
            f'NumThreads:{threads} GPULayers:[] MultiUserCache:false ProjectorPath: MainGPU:0 UseMmap:false}}"'
        )
        return
    words = "/usr/lib/ollama/llama-server --model /models/blobs/sha256-b0cd --port 44067 --host 127.0.0.1 --no-webui "
    words += f"--offline -c {context * slots} -np {slots} --log-verbosity 4 --no-log-prefix --no-log-timestamps "
    words += f"--cache-type-k {cache} --cache-type-v {cache} " if cache else ""
    yield f'{STAMP} source=llama_server.go:433 msg="starting llama-server" cmd="{words}--flash-attn {flash} -b {batch}"'
    yield f"system_info: n_threads = {threads} (n_threads_batch = {threads}) / 2 | CPU : AVX2 = 1 | REPACK = 1 | "
    if "num_gpu" in options:
        yield f"load_tensors: offloaded {options['num_gpu']}/3 layers to GPU"
    yield f"llama_context: n_ctx         = {context * slots}"
    yield f"llama_context: n_ubatch      = {batch}"
    yield f"llama_context: flash_attn    = { {'on': 'enabled', 'off': 'disabled'}.get(flash, flash) }"
    yield f"llama_kv_cache: size =    1.00 MiB ( 256 cells, 2 layers), K ({cache or 'f16'}): 0.5 MiB, V (f16): 0.5 MiB"
    yield f"srv    load_model: initializing, n_slots = {slots}, n_ctx_slot = {context}"
    yield "srv          init: model loaded"


LOAD_FAILURES = {
    "no-memory": "model requires more system memory (2.7 GiB) than is available (2.3 GiB)",
    "gpu-memory": "llama-server process has terminated: exit status 1: cudaMalloc failed: out of memory",
    "bad-model": "llama-server process has terminated: exit status 1: error loading model: unknown architecture",
}
FAILURES = {
    "port-in-use": (1, "Error: listen tcp 127.0.0.1:11434: bind: address already in use"),
}


class Handler(Engine.handler):
    def do_GET(self):  # noqa: N802 - http.server's name
        if self.path == "/api/version":
            return self.reply(503 if self.served.mode == "unhealthy" else 200, {"version": "0.40.16"})
        if self.path == "/api/tags":
            made = [{**MODEL, "name": name, "model": name} for name in self.served.made]
            return self.reply(200, {"models": [] if self.served.mode == "empty" else [MODEL, *made]})
        if self.path == "/":
            return self.reply(200, "Ollama is running", "text/plain")
        return self.reply(404, "404 page not found", "text/plain")

    def do_POST(self):  # noqa: N802 - http.server's name
        if self.path == "/api/show":
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            own = self.served.made.get(asked["model"], {})
            parameters = "\n".join(f"{name} {value}" for name, value in own.items())
            return self.reply(200, {"details": MODEL["details"], "model_info": INFO, "parameters": parameters})
        if self.path == "/api/create":
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if asked["from"] != MODEL["name"]:
                return self.error(404, f"model '{asked['from']}' not found")
            self.served.made[f"{asked['model']}:latest"] = asked["parameters"]
            return self.reply(200, {"status": "success"})
        if self.path != "/api/generate":
            return self.reply(404, "404 page not found", "text/plain")
        return super().do_POST()

    def error(self, status, message, kind=""):
        self.reply(status, {"error": message})

    def answer(self, asked, number, mode):
        if asked["model"] != MODEL["name"]:
            return self.error(404, f"model '{asked['model']}' not found")
        options = asked.get("options", {})
        if unknown := set(options) - OPTIONS - PER_REQUEST:
            return self.error(400, f"invalid option provided: {', '.join(sorted(unknown))}")
        if wrong := [name for name in OPTIONS & set(options) if not isinstance(options[name], int)]:
            return self.error(400, f'option "{wrong[0]}" must be of type integer')
        if failure := LOAD_FAILURES.get(self.served.mode):
            say(f'{STAMP} msg="Load failed" error="{failure}"')
            return self.error(500, failure)
        if self.served.mode == "dies-loading":
            say("fatal error: runtime: cannot allocate memory")
            posix._exit(2)  # coverage's own os._exit would write files while other threads run
        own = {name: value for name, value in options.items() if name in OPTIONS}
        with self.served.lock:
            if own != self.served.loaded:
                say(*load_log(own))
                self.served.loaded = own
                self.served.loads += 1
        if "prompt" not in asked:
            return self.reply(200, {"model": asked["model"], "done": True, "done_reason": "load"})
        # The first ones loaded the model and counted its words.
        return super().answer({**asked, "max_tokens": options["num_predict"]}, number, mode)

    def stream(self, asked, chat, prompt, mode):
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        began, count = time.perf_counter(), asked["max_tokens"]
        stops = mode == "stops-early" and count > 1
        for index in range(1 if stops else count):
            if mode == "cut" and count > 1 and index >= count // 2:
                self.wfile.write(b"0\r\n\r\n")
                return
            if mode == "error-line" and count > 1:
                self.line({"error": "an error was encountered while running the model: unexpected EOF"})
                self.wfile.write(b"0\r\n\r\n")
                return
            if mode == "garbage":
                self.chunk(b"hello\n")
                return
            self.line({"model": asked["model"], "response": f" {7 + index}", "done": False})
        half = int((time.perf_counter() - began) * 5e8)
        self.leave()
        self.line(
            {
                "model": asked["model"],
                "response": "",
                "done": True,
                "done_reason": "stop" if stops else "length",
                "prompt_eval_count": len(prompt.split()),
                "prompt_eval_duration": half,
                "eval_count": (1 if stops else count) - (mode == "short" and count > 1),
                "eval_duration": half,
            }
        )
        self.wfile.write(b"0\r\n\r\n")

    def line(self, piece):
        self.chunk(f"{json.dumps(piece)}\n".encode())


class Ollama(Engine):
    handler = Handler
    loaded, loads = None, 0


def client(words):
    """`ollama list` and `ollama create NAME -f FILE`."""
    asked = ("GET", "/api/tags")
    if words != ["list"]:
        _, name, _, file = words
        lines = [line.split(maxsplit=2) for line in Path(file).read_text().splitlines() if not line.startswith("#")]
        body = {"model": name, "from": next(line[1] for line in lines if line[0] == "FROM")}
        body["parameters"] = {line[1]: int(line[2]) for line in lines if line[0] == "PARAMETER"}
        asked = ("POST", "/api/create", json.dumps(body))
    server = http.client.HTTPConnection(os.environ["OLLAMA_HOST"], timeout=20)
    try:
        server.request(*asked)
        with server.getresponse() as answer:
            print(answer.read().decode())
            raise SystemExit(answer.status != 200)
    except OSError as error:
        say(f"Error: {error}")
        raise SystemExit(1) from error


def main():
    words = sys.argv[1:]
    if words == ["--version"]:
        return print("ollama version is 0.40.16")
    if words == ["list"] or (words[:1] == ["create"] and words[2:3] == ["-f"] and len(words) == 4):
        return client(words)
    if words != ["serve"]:
        say(f'Error: unknown command "{" ".join(words)}" for "ollama"')
        raise SystemExit(1)
    if unknown := {name for name in os.environ if name.startswith("OLLAMA_")} - VARIABLES:
        say(f"Error: no such variables: {', '.join(sorted(unknown))}")
        raise SystemExit(1)
    address = re.fullmatch(r"127\.0\.0\.1:(\d+)", os.environ.get("OLLAMA_HOST", "127.0.0.1:11434"))
    mode = os.environ.get("FAKE_OLLAMA", "ok")
    leave_note(NOTE)
    config = " ".join(f"{name}:{os.environ.get(name, '')}" for name in sorted(VARIABLES))
    say(f'{STAMP} source=routes.go:1951 msg="server config" env="map[{config}]"')
    # Only where it is to be measured: the one that is asked before has no context length.
    if mode == "never-runs":
        say("Error: could not create directory mkdir /models: permission denied")
        raise SystemExit(1)
    if "OLLAMA_CONTEXT_LENGTH" in os.environ:
        fail(mode, FAILURES)
    elif mode != "empty":
        mode = "ok"
    engine = Ollama(
        mode,
        model=MODEL["name"],
        port=int(address[1]),
        seats=int(variable("OLLAMA_NUM_PARALLEL", "1")),
        last_words="ggml_backend_cuda_buffer_type_alloc_buffer: allocating 50 MiB on device 0: cudaMalloc failed: out "
        "of memory",
    )
    engine.lock, engine.made = threading.Lock(), {}
    say(f'{STAMP} source=routes.go:2004 msg="Listening on 127.0.0.1:{address[1]} (version 0.40.16)"')
    return serve(engine, mode, NOTE)


if __name__ == "__main__":
    main()
