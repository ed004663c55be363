"""The sides of OpenVINO GenAI and ONNX Runtime GenAI in decode.py, run by an interpreter that has them and numpy.

    PYTHON benchmarks/genai_worker.py openvino|onnxruntime DIR THREADS      a line "PROMPT NEW" in, a line of JSON out

DIR is what their own tools make of the same Hugging Face directory:

    optimum-cli export openvino -m MODEL --task text-generation-with-past --weight-format fp16 DIR       (bfloat16 stays)
    optimum-cli export openvino ... --weight-format int8 DIR
    optimum-cli export openvino ... --weight-format int4 --group-size 128 --ratio 1.0 --sym DIR
    python -m onnxruntime_genai.models.builder -i MODEL -o DIR -p int8|int4 -e cpu --extra_options block_size=128 prune_lm_head=true
"""
from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Turn = Callable[[np.ndarray, int], list[float]]  # the times at which each of so many new tokens was there


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def openvino(path: str, threads: int, genai: Any) -> Turn:
    import openvino

    how = genai.SchedulerConfig()
    how.enable_prefix_caching = False  # a second turn would find its prompt there
    how.max_num_batched_tokens = 512
    pipe = genai.LLMPipeline(path, "CPU", scheduler_config=how, INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY")

    def turn(ids: np.ndarray, new: int) -> list[float]:
        times: list[float] = []

        class Clock(genai.StreamerBase):
            def write(self, _: object) -> Any:
                times.append(time.perf_counter())
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        pipe.generate(openvino.Tensor(ids[None]), genai.GenerationConfig(max_new_tokens=new, ignore_eos=True), Clock())
        return times
    return turn


def onnxruntime(path: str, threads: int, genai: Any) -> Turn:
    config = genai.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)

    def turn(ids: np.ndarray, new: int) -> list[float]:
        params = genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(ids) + new, min_length=len(ids) + new)
        generator = genai.Generator(model, params)
        generator.append_tokens(ids[None].astype(np.int32))
        times = []
        for _ in range(new):
            generator.generate_next_token()
            times.append(time.perf_counter())
        return times
    return turn


def main(runtime: str, path: str, threads: int) -> None:
    genai = importlib.import_module(f"{runtime}_genai")
    before, began = rss(), time.perf_counter()
    turn = {"openvino": openvino, "onnxruntime": onnxruntime}[runtime](path, threads, genai)
    loaded = time.perf_counter() - began
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, new = map(int, line.split())
        ids = np.random.default_rng(0).integers(10, 1000, prompt)
        start = time.perf_counter()
        times = turn(ids, new + 1)
        assert len(times) == new + 1, len(times)
        print(json.dumps({"prefill_tok_s": prompt / (times[0] - start), "decode_tok_s": new / (times[-1] - times[0]), "load_s": loaded,
                          "rss_over_import": rss() - before}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
