"""A stand-in for the `vllm` executable: its flags, its help, its log, its API; FAKE_VLLM says how it fails.

The help is vLLM 0.32's own (Apache-2.0), cut down to the flags that the runner uses; FAKE_VLLM_LACKS removes flags from
it, as an older version would, and FAKE_VLLM_TAKES_NO a word. Log lines and metrics are those of a real start on a CPU.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from launcher import leave_note
from openai_server import CUDA_OUT_OF_MEMORY, Engine

HELP = Path(__file__).with_name("vllm_help.txt").read_text()
if taken := os.environ.get("FAKE_VLLM_TAKES_NO"):
    HELP = HELP.replace(taken, "")
ENTRY = re.compile(r"^  (--[a-z-]+)(?:[ ,].*)?\n(?:    .*\n)*", re.MULTILINE)


def known():
    """Each flag's entry in the help, by name; also the negated ones."""
    lacking = os.environ.get("FAKE_VLLM_LACKS", "").split(",")
    found = {}
    for entry in ENTRY.finditer(HELP):
        head = re.split(r"\s{2,}", entry[0].splitlines()[0].strip())[0]
        if entry[1] not in lacking:
            found.update(dict.fromkeys(re.findall(r"--[a-z-]+", head), entry[0]))
    return found


def refuse(message):
    sys.stderr.write(f"usage: vllm serve [model_tag] [options]\nvllm serve: error: {message}\n")
    raise SystemExit(2)


def parse(words):
    """The arguments as vLLM logs them: those that differ from their defaults."""
    flags, arguments = known(), {}
    while words:
        word = words.pop(0)
        name = word.lstrip("-").replace("-", "_")
        if word not in flags:
            refuse(f"unrecognized arguments: {word}")
        if f"--no-{word[2:]}" in flags or word.startswith("--no-"):
            arguments[name.removeprefix("no_")] = not word.startswith("--no-")
            continue
        value = words.pop(0)
        choices = re.search(r"^ *--[a-z-]+ \{([^}]*)\}", flags[word])
        if choices and value not in choices[1].split(","):
            listed = ", ".join(repr(choice) for choice in choices[1].split(","))
            refuse(f"argument {word}: invalid choice: {value!r} (choose from {listed})")
        arguments[name] = int(value) if value.isdigit() else value
    if arguments.get("stream_interval") == 1:
        del arguments["stream_interval"]
    if arguments.get("optimization_level") == 2:
        del arguments["optimization_level"]
    if "speculative_config" in arguments:
        import json

        arguments["speculative_config"] = json.loads(arguments["speculative_config"])
    return arguments


def log(line, process="APIServer", level="INFO"):
    for part in line.splitlines():
        sys.stderr.write(f"({process} pid={os.getpid()}) {level} 11-25 11:00:19 [x.py:1] {part}\n")
    sys.stderr.flush()


def serve(model, arguments):
    mode = os.environ.get("FAKE_VLLM", "ok")
    leave_note("FAKE_VLLM_NOTE")
    log(f"non-default args: {dict(model_tag=model, model=model, **arguments)}")
    batched = arguments.get("max_num_batched_tokens", 2048)
    if arguments.get("max_num_seqs", 1) > batched:
        sys.stderr.write(
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for SchedulerConfig\n"
            f"  Value error, max_num_batched_tokens ({batched}) must be greater than or equal to max_num_seqs "
            f"({arguments['max_num_seqs']}). [type=value_error, input_value=ArgsKwargs(())]\n"
        )
        raise SystemExit(1)
    log(f"Chunked prefill is enabled with max_num_batched_tokens={batched}.")
    log(
        f"Initializing a V1 LLM engine (v0.32.0) with config: model='{model}', speculative_config=None, "
        f"dtype=torch.{ {'auto': 'bfloat16'}.get(arguments.get('dtype', 'auto'), arguments.get('dtype')) }, "
        f"tensor_parallel_size={arguments.get('tensor_parallel_size', 1)}, "
        f"quantization={arguments.get('quantization')}, quantization_config=None, "
        f"enforce_eager={arguments.get('enforce_eager', False)}, "
        f"kv_cache_dtype={arguments.get('kv_cache_dtype', 'auto')}, device_config=cpu, "
        f"enable_prefix_caching={arguments.get('enable_prefix_caching', True)}, "
        f"enable_chunked_prefill={arguments.get('enable_chunked_prefill', True)}, pooler_config=None",
        "EngineCore",
    )
    if mode == "oom-loading":
        log(
            f"EngineCore failed to start.\nTraceback (most recent call last):\n{CUDA_OUT_OF_MEMORY}",
            "EngineCore",
            "ERROR",
        )
        sys.stderr.write(
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
        )
        raise SystemExit(1)
    if mode == "no-cache":
        log(
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
            "initializing the engine.",
            "EngineCore",
            "ERROR",
        )
        raise SystemExit(1)
    if mode == "bad-head":
        log("ValueError: Head size 48 is not supported by CPU_ATTN.", "EngineCore", "ERROR")
        sys.stderr.write(
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
        )
        raise SystemExit(1)
    if mode == "crash-loading":
        signal.raise_signal(signal.SIGSEGV)
    if mode == "hang-loading":
        time.sleep(600)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(15, 1); signal.pause()"])
        Path(os.environ["FAKE_VLLM_NOTE"]).write_text(f"{os.getpid()} {child.pid}")
    metrics = (
        f'vllm:cache_config_info{{block_size="{arguments.get("block_size", 128)}",cache_dtype="auto",engine="0",'
        f'gpu_memory_utilization="{arguments.get("gpu_memory_utilization", 0.92)}",kv_cache_size_tokens="77568"}} 1.0\n'
    )
    seats = arguments.get("max_num_seqs", 128)
    # A cache of 8 bits costs quality.
    nats = 9.5 + 0.02 * str(arguments.get("kv_cache_dtype", "auto")).startswith("fp8")
    with Engine(mode, model=model, port=arguments["port"], seats=seats, metrics=metrics, nats=nats):
        if mode != "stubborn":
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        while True:
            signal.pause()


def main():
    words = sys.argv[1:]
    if broken := os.environ.get("FAKE_VLLM_BROKEN"):
        sys.stderr.write(f"Traceback (most recent call last):\n{broken}\n")
        raise SystemExit(1)
    if words == ["--version"]:
        print(os.environ.get("FAKE_VLLM_VERSION", "0.32.0+cpu"))
    elif words[:1] == ["serve"] and words[1:2] in (["--help=all"], ["--help"]):
        entries = dict.fromkeys(known().values())
        print("usage: vllm serve [model_tag] [options]\n\nSchedulerConfig:\n" + "".join(entries))
    else:
        serve(words[1], parse(words[2:]))


if __name__ == "__main__":
    main()
