"""onnxruntime-genai's own loop, greedy, one text at a time, in a process of its own.

Runs with any Python that has it: nothing of this project is imported. Arguments: a model's folder. A line
{"prompt": [ids], "tokens": n} on stdin is answered by one on stdout: the tokens, and when each was there.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any


def main() -> None:
    og: Any = importlib.import_module("onnxruntime_genai")
    model = og.Model(sys.argv[1])
    print(json.dumps({"version": og.__version__}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(wanted["prompt"]) + wanted["tokens"], do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(wanted["prompt"])
        tokens, times = [], []
        while not generator.is_done():
            generator.generate_next_token()
            times.append(time.perf_counter())
            tokens.append(int(generator.get_next_tokens()[0]))
        print(json.dumps({"tokens": tokens, "times": times}), flush=True)


if __name__ == "__main__":
    main()
