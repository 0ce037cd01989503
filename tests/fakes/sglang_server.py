"""A stand-in for `python -m sglang.launch_server`: its flags, help, log and API; FAKE_SGLANG says how it fails.

The help is SGLang 0.5.23's own (Apache-2.0), cut down to the flags that the runner uses; FAKE_SGLANG_LACKS removes
flags from it, as another version would. `/server_info` says what 0.5.23 says: every argument as it was resolved.
"""

import itertools
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from launcher import fail, leave_note, say, serve
from openai_server import CUDA_OUT_OF_MEMORY, Engine

HELP = Path(__file__).with_name("sglang_help.txt").read_text()
NOTE = "FAKE_SGLANG_NOTE"
STAMP = "[2026-11-25 11:00:19]"


def known():
    """Each flag's entry in the help, by name."""
    lacking = os.environ.get("FAKE_SGLANG_LACKS", "").split(",")
    found = {}
    for entry in re.split(r"\n(?=  -)", HELP)[1:]:
        names = re.findall(r"(?<![\w-])--[a-z0-9][\w-]*", re.split(r"\s{2,}", entry.strip().splitlines()[0])[0])
        if not set(names) & set(lacking):
            found.update(dict.fromkeys(names, entry))
    return found


def refuse(message):
    say("usage: sglang serve [-h] --model-path MODEL_PATH [options]", f"sglang serve: error: {message}")
    raise SystemExit(2)


def parse(words):
    """The arguments by the name that argparse gives them."""
    flags, arguments = known(), {}
    while words:
        word, equals, value = words.pop(0).partition("=")
        if word not in flags:
            refuse(f"unrecognized arguments: {word}{equals}{value}")
        head = re.split(r"\s{2,}", flags[word].strip().splitlines()[0])[0]
        name = re.match(r"--[\w-]+", head)[0][2:].replace("-", "_")
        if " " not in head.split(",")[0]:
            arguments[name] = True
            continue
        value = value if equals else words.pop(0)
        choices = re.search(r"\{([^}]*)\}", head)
        if choices and value not in choices[1].split(","):
            listed = ", ".join(choices[1].split(","))
            refuse(f"argument {word}: invalid choice: {value!r} (choose from {listed})")
        arguments[name] = int(value) if re.fullmatch(r"-?\d+", value) else value
    return arguments


def resolved(arguments):
    """What `/server_info` says: what was not given is worked out."""
    off = arguments.get("disable_cuda_graph", arguments.get("disable_decode_cuda_graph", False))
    graphs = {"backend": "disabled" if off else "full", "max_bs": arguments.get("cuda_graph_max_bs_decode", 256)}
    fraction = float(arguments.get("mem_fraction_static", 0.878))
    return {
        "max_running_requests": None,
        "chunked_prefill_size": 8192,
        "max_prefill_tokens": 16384,
        "schedule_policy": "fcfs",
        "stream_interval": 1,
        "disable_radix_cache": False,
        "attention_backend": "fa3",
        "page_size": 1,
        "tp_size": 1,
        "kv_cache_dtype": "auto",
        "quantization": None,
        **arguments,
        "mem_fraction_static": fraction,
        "schedule_conservativeness": float(arguments.get("schedule_conservativeness", 1.0)),
        "cuda_graph_config": {"decode": graphs, "prefill": {"backend": "breakable"}},
        "max_total_num_tokens": 77568,
        "version": "0.5.23",
    }


class Native:
    """`/generate` for one list of token ids, as 0.5.23 answers it, with its radix cache.

    A cache of 8 bits costs quality, but only by what is read back from it: the tokens of one step are attended to as
    they were computed.
    """

    def __init__(self, arguments):
        self.page = arguments.get("page_size", 1)
        self.radix = not arguments.get("disable_radix_cache", False)
        self.cost = 0.02 * str(arguments.get("kv_cache_dtype", "auto")).startswith("fp8")
        self.seen = []

    def __call__(self, asked, mode):
        ids, start = asked["input_ids"], asked.get("logprob_start_len", -1)
        most = min(len(ids) - 1, start) if start >= 0 else len(ids) - 1
        shared = [sum(itertools.takewhile(bool, (a == b for a, b in zip(ids, old, strict=False)))) for old in self.seen]
        cached = min(most, max(shared, default=0)) // self.page * self.page if self.radix else 0
        self.seen.append(ids)
        count = asked["sampling_params"]["max_new_tokens"]
        meta = {"id": "1", "finish_reason": {"type": "length", "length": count}, "prompt_tokens": len(ids)}
        meta |= {"completion_tokens": count, "cached_tokens": cached}
        if asked.get("return_logprob"):
            logprob = {"nan": None, "impossible": -9999.0}.get(mode, -9.5 - self.cost * cached / max(start, 1))
            shown = [1 if mode == "other-tokens" else i for i in ids[start:]]
            # Nothing is known of the first one; the texts are asked for apart.
            meta["input_token_logprobs"] = [[None if at == 0 else logprob, i, None] for at, i in enumerate(shown)]
            meta["output_token_logprobs"] = [[-1.0, 5, None]] * count
            if mode == "no-logprobs":
                del meta["input_token_logprobs"]
            if mode == "odd-logprobs":
                meta["input_token_logprobs"] = [-1.0]
        answer = {"text": "x" * count, "output_ids": [2000 + i for i in range(count)], "meta_info": meta}
        if mode == "no-token-ids":
            del answer["output_ids"]
        return answer


FAILURES = {
    "oom-loading": (
        1,
        f"{STAMP} Scheduler hit an exception: Traceback (most recent call last):",
        CUDA_OUT_OF_MEMORY,
        "",
        f"{STAMP} Received sigquit from a child process. It usually means the child failed.",
    ),
    "no-cache": (
        1,
        f"{STAMP} Scheduler hit an exception: Traceback (most recent call last):",
        (
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. Current value: "
            "mem_fraction_static=0.5"
        ),
    ),
    "bad-backend": (
        1,
        f"{STAMP} Scheduler hit an exception: Traceback (most recent call last):",
        "AssertionError: FlashAttention v3 Backend requires SM>=80 and SM<=90. Please use `--attention-backend flash`.",
        "RuntimeError: Rank 0 scheduler died during initialization (exit code: 1).",
    ),
    "port-in-use": (
        1,
        "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 30000): address already in use",
    ),
}


def main():
    words = sys.argv[1:]
    if words[:2] == ["-m", "sglang.launch_server"]:
        words = words[2:]
    elif words[:1] == ["serve"]:
        words = words[1:]
    if broken := os.environ.get("FAKE_SGLANG_BROKEN"):
        say("Traceback (most recent call last):", broken)
        raise SystemExit(1)
    if words == ["--help"]:
        print("usage: sglang serve [-h] [options]\n\noptions:")
        print("\n".join(dict.fromkeys(known().values())))
        return
    arguments = parse(words)
    mode = os.environ.get("FAKE_SGLANG", "ok")
    leave_note(NOTE)
    say(f"{STAMP} server_args=ServerArgs(model_path={arguments['model_path']!r})")
    if arguments.get("page_size", 1) > 1 and arguments.get("chunked_prefill_size", 8192) % arguments["page_size"]:
        say("AssertionError: chunked_prefill_size must be divisible by page_size")
        raise SystemExit(1)
    fail(mode, FAILURES)
    engine = Engine(
        mode,
        model=arguments["model_path"],
        port=arguments["port"],
        seats=arguments.get("max_running_requests", 2048),
        pages={os.environ.get("FAKE_SGLANG_INFO", "/server_info"): resolved(arguments)},
        native=Native(arguments),
        last_words=f"{STAMP} Decode out of memory. Try to lower your batch size.",
    )
    serve(engine, mode, NOTE)


if __name__ == "__main__":
    main()
