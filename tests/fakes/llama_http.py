"""llama.cpp's own server on a port of loopback, with the tiny generated model: `python llama_http.py PORT`."""

import signal
import sys
from pathlib import Path

import xllamacpp

from tuner.files import load_runner
from tuner.models import gguf
from tuner.trial import Target

ROOT = Path(__file__).parents[2]

llama = load_runner(ROOT / "runners" / "llama.py")
target = Target(size="tiny")
params = llama._parameters(xllamacpp, llama.space(target).default(), target, gguf.read(target))
params.port = int(sys.argv[1])
params.api_keys = []
server = xllamacpp.Server(params)
signal.pause()
