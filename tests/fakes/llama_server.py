"""A stand-in for the `llama-server` executable: its flags, help, log and API; FAKE_LLAMA_SERVER says how it fails.

The help is llama.cpp b10434's own (MIT), cut down; FAKE_LLAMA_LACKS removes flags from it, as an older build would.
Log lines are those of a real start on a CPU. With FAKE_LLAMA_ENGINE=xllamacpp the answers are llama.cpp's: the same
flags start its own HTTP server, from the package xllamacpp.
"""

import os
import re
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from launcher import fail, leave_note, say, serve

HELP = Path(__file__).with_name("llama_server_help.txt").read_text()
NOTE = "FAKE_LLAMA_NOTE"
VALUES = {"--flash-attn": ("on", "off", "auto"), "--fit": ("on", "off")}
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


def entries():
    """(first line without its explanation, names, whole text) of each flag that this build has."""
    lacking = filter(None, os.environ.get("FAKE_LLAMA_LACKS", "").split(","))
    cut = re.compile("|".join(rf"(?<![\w-]){re.escape(name)}(?![\w-])(?:, +)?" for name in lacking) or "(?!)")
    for entry in re.split(r"\n(?=-)", HELP):
        first, line_break, rest = entry.partition("\n")
        first = cut.sub("", first)
        if first.startswith("-") and not first.startswith("----"):
            head = re.split(r"\s{2,}(?=[^-\s])", first)[0].rstrip(", ")
            yield head, re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", head), f"{first}{line_break}{rest}"


def print_help():
    for _, _, entry in entries():
        print(entry.rstrip("\n"))


def refuse(message):
    say(message)
    raise SystemExit(1)


def parse(words):
    """The arguments by long name."""
    known, arguments = {}, {}
    for head, names, _ in entries():
        takes_value = bool(re.search(r" (?:[A-Z]+|<[^>]+>|\[[^\]]+\])$", head))
        long = next(name for name in names if name.startswith("--"))
        known |= dict.fromkeys(names, (long, takes_value))
    while words:
        word = words.pop(0)
        if word not in known:
            refuse(f"error: invalid argument: {word}")
        long, takes_value = known[word]
        if not takes_value:
            arguments[long] = not word.startswith(("--no-", "-no", "-nr"))
            continue
        value = words.pop(0)
        if value not in VALUES.get(long, (value,)):
            refuse(f"error while handling argument \"{word}\": error: unknown value for {long}: '{value}'\n\n\nusage:")
        if long.startswith("--cache-type") and value not in CACHE_TYPES:
            refuse(f'error while handling argument "{word}": Unsupported cache type: {value}')
        arguments[long] = value
    return arguments


def start_log(arguments):
    """The lines up to the loaded model."""
    threads = int(arguments.get("--threads", -1))
    threads = threads if threads > 0 else 2
    batch_threads = int(arguments.get("--threads-batch", threads))
    openmp = "" if os.environ.get("FAKE_LLAMA_OPENMP") == "0" else "OPENMP = 1 | "
    yield (
        f"0.00.006.579 I cmn  common_param: system_info: n_threads = {threads} (n_threads_batch = {batch_threads}) / 2 "
        f"| CPU : SSE3 = 1 | LLAMAFILE = 1 | {openmp}REPACK = 1 | "
    )
    if arguments.get("--model") == "/dev/null":
        yield "0.00.009.980 E gguf_init_from_reader: failed to read magic"
        yield "0.00.010.065 E llama_model_load: error loading model: llama_model_loader: failed to load model"
        yield "0.00.011.634 E srv  llama_server: exiting due to model loading error"
        return
    batch = min(int(arguments.get("--batch-size", 2048)), int(arguments["--ctx-size"]))
    if arguments.get("--cache-type-v", "f16") != "f16" and arguments.get("--flash-attn") == "off":
        yield "0.00.020.001 E llama_init_from_model: V cache quantization requires flash_attn"
        yield "0.00.020.002 E cmn  common_init_: failed to create context with model"
        return
    unified = arguments.get("--kv-unified", "--parallel" not in arguments)
    mode = arguments.get("--load-mode", "auto" if arguments.get("--mmap", True) else "none")
    yield f"0.00.010.100 I load_tensors: loading model tensors, this can take a while... (load_mode = {mode})"
    if arguments.get("--repack", True):
        yield "0.00.012.000 I load_tensors:   CPU_REPACK model buffer size =     0.10 MiB"
    if layers := arguments.get("--gpu-layers"):
        yield f"0.00.013.000 I load_tensors: offloaded {layers}/3 layers to GPU"
    yield f"0.00.014.000 I llama_context: n_ctx         = {arguments['--ctx-size']}"
    yield f"0.00.014.000 I llama_context: n_batch       = {batch}"
    yield f"0.00.014.000 I llama_context: n_ubatch      = {min(batch, int(arguments.get('--ubatch-size', 512)))}"
    flash = {"on": "enabled", "off": "disabled"}.get(arguments.get("--flash-attn", "auto"), "auto")
    yield f"0.00.014.000 I llama_context: flash_attn    = {flash}"
    yield f"0.00.014.000 I llama_context: kv_unified    = {'true' if unified else 'false'}"
    k, v = (arguments.get(f"--cache-type-{side}", "f16") for side in "kv")
    yield (
        "0.00.015.000 I llama_kv_cache: size =    1.00 MiB (  1024 cells,   2 layers,  4/1 seqs), "
        f"K ({k}):    0.50 MiB, V ({v}):    0.50 MiB"
    )
    if flash == "auto":
        yield "0.00.016.000 I sched_reserve: Flash Attention was auto, set to enabled"
        yield "0.00.016.000 I resolve_fused_ops: Flash Attention enabled"
    slots = int(arguments.get("--parallel", -1))
    yield f"0.00.017.000 I srv    load_model: initializing, n_slots = {slots if slots > 0 else 4}, n_ctx_slot = 256"
    yield "0.00.018.000 I srv          init: model loaded"


class Forced:
    """Completions that are not streamed, as the build of August 2026 answers them: a grammar names each token.

    A cache of fewer bits costs quality.
    """

    def __init__(self, arguments):
        self.cost = 0.005 * any(arguments.get(f"--cache-type-{side}", "f16") != "f16" for side in "kv")

    def __call__(self, asked, mode):
        if "content" in asked:
            words = re.findall(r"\w+|[^\w\s]", asked["content"])
            return {"tokens": "none" if mode == "odd-tokens" else [300 + len(word) for word in words]}
        count = asked["n_predict"] - (mode == "short-answer")
        ids = [int(i) for i in re.findall(r"<\[(\d+)\]>", asked.get("grammar", ""))] or [400 + i for i in range(count)]
        if mode == "other-tokens" and "grammar" in asked:
            ids = [i + 1 for i in ids]
        # A probability of 0 is written as the least number of 32 bits; JSON has no NaN.
        logprob = {"nan": None, "impossible": -3.4028234663852886e38}.get(mode, -6.5 - self.cost)
        told = [{"id": i, "token": "x", "bytes": [120], "logprob": logprob, "top_logprobs": []} for i in ids[:count]]
        told = None if mode == "no-logprobs" else {"content": told}
        choice = {"text": "x" * count, "index": 0, "logprobs": told, "finish_reason": "length"}
        return {"choices": [choice], "usage": {"completion_tokens": count}}


FAILURES = {
    "oom-loading": (
        1,
        (
            "0.00.100.000 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4403.49 MiB on device 0: cudaMalloc "
            "failed: out of memory"
        ),
        "0.00.100.001 E alloc_tensor_range: failed to allocate CUDA0 buffer of size 4617398272",
        "0.00.100.002 E llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        "0.00.100.003 E srv  llama_server: exiting due to model loading error",
    ),
    "bad-model": (
        1,
        "0.00.010.065 E llama_model_load: error loading model: missing tensor 'blk.0.attn_q.weight'",
        "0.00.011.634 E srv  llama_server: exiting due to model loading error",
    ),
    "port-in-use": (1, "0.00.007.700 E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1"),
}


def real(arguments):
    """llama.cpp's own server with these arguments."""
    import xllamacpp as x

    params = x.CommonParams()
    params.model.path = arguments["--model"]
    params.fit_params = params.ui = False
    params.verbosity = int(arguments.get("--verbosity", 3))
    params.port, params.api_keys = int(arguments["--port"]), []
    params.n_ctx, params.n_parallel = int(arguments["--ctx-size"]), int(arguments["--parallel"])
    params.kv_unified = arguments.get("--kv-unified", False)
    params.cont_batching = arguments.get("--cont-batching", True)
    params.n_batch, params.n_ubatch = int(arguments["--batch-size"]), int(arguments["--ubatch-size"])
    params.cpuparams.n_threads = int(arguments["--threads"])
    params.cpuparams_batch.n_threads = int(arguments["--threads-batch"])
    params.no_extra_bufts = not arguments.get("--repack", True)
    flash = {"off": "DISABLED", "on": "ENABLED", "auto": "AUTO"}[arguments["--flash-attn"]]
    params.flash_attn_type = x.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{flash}"]
    params.load_mode = x.llama_load_mode[f"LLAMA_LOAD_MODE_{arguments['--load-mode'].upper()}"]
    params.cache_ram_mib = int(arguments["--cache-ram"])
    server = x.Server(params)
    while server:
        signal.pause()


def main():
    words = sys.argv[1:]
    if broken := os.environ.get("FAKE_LLAMA_BROKEN"):
        say(broken)
        raise SystemExit(127)
    if words == ["--help"]:
        return print_help()
    if words == ["--version"]:
        return say(f"version: {os.environ.get('FAKE_LLAMA_VERSION', '10434 (7e4c0a9)')}\nbuilt with a stand-in")
    if words == ["--list-devices"]:
        return print("Available devices:\n" + os.environ.get("FAKE_LLAMA_DEVICES", "  (none)"))
    arguments = parse(words)
    mode = os.environ.get("FAKE_LLAMA_SERVER", "ok")
    if arguments["--model"] != "/dev/null":
        leave_note(NOTE)
        fail(mode, FAILURES)
    if os.environ.get("FAKE_LLAMA_ENGINE") == "xllamacpp" and arguments["--model"] != "/dev/null":
        return real(arguments)
    lines = list(start_log(arguments))
    say(*lines)
    if " E " in lines[-1]:
        raise SystemExit(1)
    from openai_server import Engine

    engine = Engine(
        mode,
        model=Path(arguments["--model"]).name,
        port=int(arguments["--port"]),
        seats=max(1, int(arguments.get("--parallel", 4))),
        timed=True,
        forced=Forced(arguments),
        last_words="0.09.000.000 E ggml_vulkan: Device memory allocation of size 1073741824 failed.",
    )
    return serve(engine, mode, NOTE)


if __name__ == "__main__":
    main()
