"""A linear layer [out, in] or a SwiGLU MLP as other runtimes run it: each function gives a maker of copies, or None without
the package.

A maker packs a copy of the layer once and returns a call; what the call takes and gives stays in the runtime's own arrays.
"""
from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.methods.codes import nearest

Call = Callable[[], Any]
Maker = Callable[[], Call]


_pool: list[int] = []  # ONNX Runtime has one for all sessions: the threads of idle ones would spin


def have(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def torch_plain(w: Tensor, x: Tensor) -> Maker:
    """torch.nn.functional.linear."""
    def make() -> Call:
        copy = w.clone()
        return lambda: torch.nn.functional.linear(x, copy)
    return make


def torch_prepacked(w: Tensor, x: Tensor) -> Maker:
    """oneDNN on a weight laid out for it once, as torch's compiler does when it freezes a model."""
    def make() -> Call:
        packed = torch.ops.mkldnn._reorder_linear_weight(w, len(x))
        return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return make


def torch_int8(w: Tensor, x: Tensor) -> Maker:
    """torch.ao's dynamic quantisation: weights of 8 bits a row, x of 7 bits a tensor."""
    def make() -> Call:
        layer = torch.nn.Sequential(torch.nn.Linear(w.shape[1], w.shape[0], bias=False))
        layer[0].weight.data = w.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantised = torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, dtype=torch.qint8)
        return lambda: quantised(x)
    return make


def _session(nodes: list[Any], weights: list[Any], x: Tensor, out: int, threads: int, domains: dict[str, int]) -> Call:
    """An ONNX graph x -> y in ONNX Runtime, with input and output bound to fixed memory."""
    import onnx
    import onnxruntime as ort

    graph = onnx.helper.make_graph(
        nodes, "layer", [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(x.shape))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [len(x), out])], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in domains.items()], ir_version=10)
    options = ort.SessionOptions()
    if not _pool:
        ort.set_global_thread_pool_sizes(threads, 1)
        _pool.append(threads)
    options.use_per_session_threads = False
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x.numpy())
    binding.bind_output("y", "cpu")
    return lambda: session.run_with_iobinding(binding)


def ort_nbits(w: Tensor, x: Tensor, bits: int, group: int, threads: int) -> Maker | None:
    """ONNX Runtime's MatMulNBits, x rounded to 8 bits (accuracy level 4)."""
    if not have("onnxruntime") or not have("onnx"):
        return None
    import onnx

    codes = nearest(w, bits, group)
    packed = codes.codes.view(w.shape[0], -1, group)
    if bits == 4:
        packed = packed[..., ::2] | packed[..., 1::2] << 4
    scales = codes.scales.float().flatten()

    def make() -> Call:
        node = onnx.helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=w.shape[1], N=w.shape[0],
                                     bits=bits, block_size=group, accuracy_level=4)
        return _session([node], [onnx.numpy_helper.from_array(packed.numpy(), "b"), onnx.numpy_helper.from_array(scales.numpy(), "s")],
                        x, w.shape[0], threads, {"": 21, "com.microsoft": 1})
    return make


def ort_int8(w: Tensor, x: Tensor, threads: int) -> Maker | None:
    """ONNX Runtime's dynamic quantisation: weights of 8 bits, x of 8 bits a tensor."""
    if not have("onnxruntime") or not have("onnx"):
        return None
    import onnx

    scale = float(w.abs().max()) / 127
    codes = (w / scale).round().clamp(-127, 127).to(torch.int8).T.contiguous()

    def make() -> Call:
        h = onnx.helper.make_node
        nodes = [h("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"]), h("MatMulInteger", ["q", "b", "qz"], ["i"]),
                 h("Cast", ["i"], ["f"], to=onnx.TensorProto.FLOAT), h("Mul", ["qs", "s"], ["t"]), h("Mul", ["f", "t"], ["y"])]
        weights = [onnx.numpy_helper.from_array(codes.numpy(), "b"), onnx.numpy_helper.from_array(np.float32(scale), "s")]
        return _session(nodes, weights, x, w.shape[0], threads, {"": 21})
    return make


def _compiled(model: Any, x: Tensor, dtype: torch.dtype, threads: int) -> Call:
    import openvino as ov

    compiled = ov.Core().compile_model(model, "CPU", {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32", "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(x.float().numpy()))
    return request.infer


def openvino_dense(w: Tensor, x: Tensor, threads: int) -> Maker | None:
    """OpenVINO's MatMul, computed in the precision of `w`."""
    if not have("openvino"):
        return None
    import openvino as ov
    from openvino import opset13 as ops

    def make() -> Call:
        p = ops.parameter(list(x.shape), ov.Type.f32)
        y = ops.matmul(p, ops.constant(w.float().numpy()), False, True)
        return _compiled(ov.Model([y], [p]), x, w.dtype, threads)
    return make


# ---- SwiGLU MLPs: gate, up [ff, d], down [d, ff] ------------------------------------------------
def torch_mlp(weights: list[Tensor], x: Tensor) -> Maker:
    """torch.nn.functional.linear, three times."""
    f = torch.nn.functional

    def make() -> Call:
        gate, up, down = (w.clone() for w in weights)
        return lambda: f.linear(f.silu(f.linear(x, gate)) * f.linear(x, up), down)
    return make


def prepacked_mlp(weights: list[Tensor], x: Tensor) -> Maker:
    """oneDNN on weights laid out for it once, silu inside the first layer."""
    run = torch.ops.mkldnn._linear_pointwise

    def make() -> Call:
        gate, up, down = (torch.ops.mkldnn._reorder_linear_weight(w, len(x)) for w in weights)
        return lambda: run(run(x, gate, None, "swish", [], "") * run(x, up, None, "none", [], ""), down, None, "none", [], "")
    return make


def openvino_mlp(weights: list[Tensor], x: Tensor, threads: int) -> Maker | None:
    """OpenVINO, computed in the precision of the weights."""
    if not have("openvino"):
        return None
    import openvino as ov
    from openvino import opset13 as ops

    def make() -> Call:
        p = ops.parameter(list(x.shape), ov.Type.f32)
        gate, up, down = (ops.constant(w.float().numpy()) for w in weights)
        y = ops.matmul(ops.multiply(ops.swish(ops.matmul(p, gate, False, True)), ops.matmul(p, up, False, True)), down, False, True)
        return _compiled(ov.Model([y], [p]), x, weights[0].dtype, threads)
    return make


# ---- DeepSparse, in a process of its own --------------------------------------------------------
def deepsparse(python: Path, weights: list[Tensor], x: Tensor, threads: int, copies: int) -> Callable[[int], list[float]]:
    """A function of a number of calls that gives the seconds of each; weights float32, one or the three of an MLP.

    The process ends with the interpreter. RuntimeError if it does not start.
    """
    folder = tempfile.TemporaryDirectory()
    at = Path(folder.name)
    for name, t in [("x", x), *((f"w{i}", w) for i, w in enumerate(weights))]:
        np.save(at / f"{name}.npy", t.float().numpy())
    spec = {"x": str(at / "x.npy"), "weights": [str(at / f"w{i}.npy") for i in range(len(weights))], "threads": threads, "copies": copies}
    (at / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    worker = subprocess.Popen([python, Path(__file__).with_name("deepsparse_worker.py"), at / "spec.json"], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={"PATH": os.environ["PATH"]})
    assert worker.stdin and worker.stdout
    to, back = worker.stdin, worker.stdout
    if "ready" not in (line.strip() for line in iter(back.readline, "")):
        raise RuntimeError(f"{python} does not run DeepSparse")
    atexit.register(worker.kill)
    folder.cleanup()

    def call(count: int) -> list[float]:
        to.write(f"{count}\n")
        to.flush()
        return json.loads(back.readline())
    return call
