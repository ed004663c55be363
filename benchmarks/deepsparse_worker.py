"""DeepSparse's side of kernels.py, run by an interpreter that has deepsparse 1.8 and protobuf below 3.21.

    PYTHON benchmarks/deepsparse_worker.py SPEC.json      a line "CALLS" in, a line of JSON out: seconds of each call

SPEC: `x` and `weights` are .npy files; one weight [out, in] is a linear layer, three are the gate, up and down of a SwiGLU MLP;
`copies`: engines that take turns, so that weights are cold; `threads`.
"""
from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import deepsparse
import numpy as np
import onnx
from onnx import helper, numpy_helper


def graph(x: Any, weights: list[Any], path: Path) -> None:
    """The layer or the MLP as an ONNX file."""
    if len(weights) == 1:
        nodes = [helper.make_node("MatMul", ["x", "w0"], ["y"])]
    else:
        nodes = [helper.make_node("MatMul", ["x", "w0"], ["g"]), helper.make_node("MatMul", ["x", "w1"], ["u"]),
                 helper.make_node("Sigmoid", ["g"], ["s"]), helper.make_node("Mul", ["g", "s"], ["a"]),
                 helper.make_node("Mul", ["a", "u"], ["h"]), helper.make_node("MatMul", ["h", "w2"], ["y"])]
    given = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(x.shape))]
    made = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [len(x), len(weights[-1])])]
    held = [numpy_helper.from_array(np.ascontiguousarray(w.T), f"w{i}") for i, w in enumerate(weights)]
    whole = helper.make_graph(nodes, "layer", given, made, held)
    onnx.save(helper.make_model(whole, opset_imports=[helper.make_opsetid("", 13)]), str(path))


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    x = np.load(spec["x"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        graph(x, [np.load(w) for w in spec["weights"]], path)
        engines = [deepsparse.Engine(str(path), batch_size=len(x), num_cores=spec["threads"]) for _ in range(spec["copies"])]
    for e in engines:
        e.run([x])
    print("ready", flush=True)
    at = 0
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            at += 1
            start = time.perf_counter()
            engines[at % len(engines)].run([x])
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
