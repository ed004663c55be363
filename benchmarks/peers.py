"""A linear layer [out, in] or a SwiGLU MLP as other runtimes run it: each function gives a maker of copies, or None without
the package.

A maker packs a copy of the layer once and returns a call, which returns y. Copies of OpenVINO's and ONNX Runtime's layers write to
memory that they share, as ours do; torch's allocator gives it what the call before gave back: nobody pays for pages that
were never touched.
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
Array = np.ndarray[Any, np.dtype[np.float32]]

_pool: list[int] = []  # ONNX Runtime has one for all sessions: the threads of idle ones would spin


def have(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _result(w: Tensor, x: Tensor) -> Array:
    """Memory for y, touched."""
    return np.full((len(x), w.shape[0]), 0, np.float32)


def _hint(w: Tensor) -> str:
    return "bf16" if w.dtype == torch.bfloat16 else "f32"


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


def torch_int4(w: Tensor, x: Tensor, group: int) -> Maker:
    """torch's weight-only int4: codes of 4 bits with scales and zeros in bfloat16, x in bfloat16."""
    codes = nearest(w, 4, group)
    scales = codes.grid.scales.T.to(torch.bfloat16)
    both, its = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous(), x.to(torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.codes.int(), 1)

    def make() -> Call:
        copy, side = packed.clone(), both.clone()
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(its, copy, group, side)
    return make


def _session(nodes: list[Any], weights: list[Any], x: Tensor, y: Array, threads: int, domains: dict[str, int]) -> Call:
    """An ONNX graph x -> y in ONNX Runtime, with input and output bound to fixed memory."""
    import onnx
    import onnxruntime as ort

    graph = onnx.helper.make_graph(
        nodes, "layer", [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(x.shape))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, list(y.shape))], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in domains.items()], ir_version=10)
    options = ort.SessionOptions()
    if not _pool:
        ort.set_global_thread_pool_sizes(threads, 1)
        _pool.append(threads)
    options.use_per_session_threads = False
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x.numpy())
    binding.bind_output("y", "cpu", 0, np.float32, list(y.shape), y.ctypes.data)

    def call() -> Array:
        session.run_with_iobinding(binding)
        return y
    return call


def ort_nbits(w: Tensor, x: Tensor, bits: int, group: int, threads: int) -> Maker | None:
    """ONNX Runtime's MatMulNBits, x rounded to 8 bits (accuracy level 4)."""
    if not have("onnxruntime") or not have("onnx"):
        return None
    import onnx

    codes = nearest(w, bits, group)
    packed = codes.codes.view(w.shape[0], -1, group)
    if bits == 4:
        packed = packed[..., ::2] | packed[..., 1::2] << 4
    scales, y = codes.grid.scales.float().flatten(), _result(w, x)

    def make() -> Call:
        node = onnx.helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=w.shape[1], N=w.shape[0],
                                     bits=bits, block_size=group, accuracy_level=4)
        return _session([node], [onnx.numpy_helper.from_array(packed.numpy(), "b"), onnx.numpy_helper.from_array(scales.numpy(), "s")],
                        x, y, threads, {"": 21, "com.microsoft": 1})
    return make


def ort_int8(w: Tensor, x: Tensor, threads: int) -> Maker | None:
    """ONNX Runtime's dynamic quantisation: weights of 8 bits, x of 8 bits a tensor."""
    if not have("onnxruntime") or not have("onnx"):
        return None
    import onnx

    scale = float(w.abs().max()) / 127
    codes, y = (w / scale).round().clamp(-127, 127).to(torch.int8).T.contiguous(), _result(w, x)

    def make() -> Call:
        h = onnx.helper.make_node
        nodes = [h("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"]), h("MatMulInteger", ["q", "b", "qz"], ["i"]),
                 h("Cast", ["i"], ["f"], to=onnx.TensorProto.FLOAT), h("Mul", ["qs", "s"], ["t"]), h("Mul", ["f", "t"], ["y"])]
        weights = [onnx.numpy_helper.from_array(codes.numpy(), "b"), onnx.numpy_helper.from_array(np.float32(scale), "s")]
        return _session(nodes, weights, x, y, threads, {"": 21})
    return make


def _compiled(y: Any, p: Any, x: Tensor, to: Array, hint: str, threads: int) -> Call:
    """An OpenVINO graph from `p` to `y`, which writes to `to`; `hint`: the precision it may compute in."""
    import openvino as ov

    compiled = ov.Core().compile_model(ov.Model([y], [p]), "CPU", {
        "INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(x.float().numpy()))
    request.set_output_tensor(ov.Tensor(to, shared_memory=True))

    def call() -> Array:
        request.infer(share_outputs=True)  # without it the results are copied to new memory
        return to
    return call


def openvino_dense(w: Tensor, x: Tensor, threads: int) -> Maker | None:
    """OpenVINO's MatMul, computed in the precision of `w`."""
    if not have("openvino"):
        return None
    import openvino as ov
    from openvino import opset13 as ops

    to = _result(w, x)

    def make() -> Call:
        p = ops.parameter(list(x.shape), ov.Type.f32)
        y = ops.matmul(p, ops.constant(w.float().numpy()), False, True)
        return _compiled(y, p, x, to, _hint(w), threads)
    return make


def openvino_codes(w: Tensor, x: Tensor, bits: int, group: int, threads: int) -> Maker | None:
    """OpenVINO's compressed weights, codes of 8 or 4 bits (`group` 0: a scale a row); x is rounded to 8 bits by groups of 32,
    which is its default."""
    if not have("openvino"):
        return None
    import openvino as ov
    from openvino import opset13 as ops

    codes, to = nearest(w, bits, group), _result(w, x)
    out, inputs = w.shape
    shape = [out, inputs // codes.group, codes.group] if group else [out, inputs]
    packed = codes.codes if bits == 8 else codes.codes[:, ::2] | codes.codes[:, 1::2] << 4
    kind = ov.Type.u8 if bits == 8 else ov.Type.u4
    scales = codes.grid.scales.half().view(*shape[:-1], 1).numpy()

    def make() -> Call:
        p = ops.parameter(list(x.shape), ov.Type.f32)
        held = ops.constant(ov.Tensor(packed.numpy(), ov.Shape(shape), kind))
        zero = np.array([codes.grid.levels // 2], np.uint8)
        middle = ops.constant(ov.Tensor(zero, ov.Shape([1] * len(shape)), kind))
        half = ops.subtract(ops.convert(held, "f16"), ops.convert(middle, "f16"))
        weight = ops.multiply(half, ops.constant(scales))
        if group:
            weight = ops.reshape(weight, ops.constant(np.array([out, inputs])), False)
        return _compiled(ops.matmul(p, ops.convert(weight, "f32"), False, True), p, x, to, "f32", threads)
    return make


def openvino_w8a8(w: Tensor, x: Tensor, threads: int) -> Maker | None:
    """OpenVINO's quantised graph: weights of 8 bits a row, x of 8 bits a tensor, its range known beforehand."""
    if not have("openvino"):
        return None
    import openvino as ov
    from openvino import opset13 as ops

    to, most = _result(w, x), float(x.abs().max())
    scales = w.abs().amax(1, keepdim=True) / 127
    codes = (w / scales).round().to(torch.int8).numpy()

    def make() -> Call:
        p = ops.parameter(list(x.shape), ov.Type.f32)
        low, high = ops.constant(np.float32(-most * 128 / 127)), ops.constant(np.float32(most))
        weight = ops.multiply(ops.convert(ops.constant(codes), "f32"), ops.constant(scales.numpy()))
        return _compiled(ops.matmul(ops.fake_quantize(p, low, high, low, high, 256), weight, False, True), p, x, to, "f32", threads)
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

    to = _result(weights[2], x)

    def make() -> Call:
        p = ops.parameter(list(x.shape), ov.Type.f32)
        gate, up, down = (ops.constant(w.float().numpy()) for w in weights)
        y = ops.matmul(ops.multiply(ops.swish(ops.matmul(p, gate, False, True)), ops.matmul(p, up, False, True)), down, False, True)
        return _compiled(y, p, x, to, _hint(weights[0]), threads)
    return make


# ---- DeepSparse, in a process of its own --------------------------------------------------------
def deepsparse(python: Path, weights: list[Tensor], x: Tensor, threads: int,
               copies: int) -> tuple[Callable[[int], list[float]], Callable[[], None]]:
    """A function of a number of calls that gives the seconds of each, and one that ends the process; weights float32, one or the
    three of an MLP. RuntimeError if it does not start.
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

    def end() -> None:
        worker.kill()
        worker.wait()
    return call, end
