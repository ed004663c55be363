"""One linear layer [out, in] as other runtimes run it: each function gives a maker of copies, or None without the package.

A maker packs a copy of the layer once and returns a call; what the call takes and gives stays in the runtime's own arrays.
"""
from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
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


def openvino_dense(w: Tensor, x: Tensor, threads: int) -> Maker | None:
    """OpenVINO's MatMul, computed in the precision of `w`."""
    if not have("openvino"):
        return None
    import openvino as ov
    from openvino import opset13 as ops

    core = ov.Core()
    given = x.float().numpy()

    def make() -> Call:
        p = ops.parameter(list(x.shape), ov.Type.f32)
        y = ops.matmul(p, ops.constant(w.float().numpy()), False, True)
        compiled = core.compile_model(ov.Model([y], [p]), "CPU", {
            "INFERENCE_PRECISION_HINT": "bf16" if w.dtype == torch.bfloat16 else "f32", "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY"})
        request = compiled.create_infer_request()
        request.set_input_tensor(ov.Tensor(given))
        return request.infer
    return make
