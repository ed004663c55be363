"""Hugging Face checkpoint directories on disk: read by pread, written like they were, never mapped into memory."""
from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.journal import sync, write_json
from trimtab.core.types import BadInput
from trimtab.methods.codes import Codes
from trimtab.methods.format.panels import Packed
from trimtab.network import foreign
from trimtab.runtime.layouts import VERSION, described, restored

CHUNK = 8 << 20
LINE = 64       # bytes of a cache line: where the data of a file of ours begins
SHARD = 5 << 30
PACKED = ".packed_"  # between the name of a packed layer and that of its buffer
SHARED = "shared"    # of what says what is packed: buffers that lie under the name of another layer's, by their own
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MOST = 2**60  # entries of a tensor: their bytes can still be counted in 64 bits
NOT_JSON = (ValueError, RecursionError)  # JSON and UTF-8 errors; lists in lists in lists
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
# Other copies of the weights: an edited checkpoint that carried them along would contradict itself.
COPIES = PICKLES | {".h5", ".msgpack", ".ot", ".onnx", ".gguf"}
SAYS_HOW = ("quantize_config.json", "quant_config.json", "quant_log.csv")  # of the programs whose codes are decoded here
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}


About = Callable[[dict[str, str]], dict[str, str]]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `begin` to `end` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


PARTS = "trimtab.safetensors"  # what beside the weights says what they are made of, by `<site>:<part>`


class SafeFile:
    """One safetensors file. `names` in the order of the data, `metadata`, `entries`; BadInput when it is damaged."""

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                self.head = length + 8
                if size < 8 or self.head > size:
                    raise self._bad(f"truncated: its header needs {self.head} bytes, the file has {size}")
                header = json.loads(f.read(length))
        except FileNotFoundError:
            raise BadInput(f"{path} is missing") from None
        except OSError as e:
            raise BadInput(f"{path} cannot be read ({e.strerror or e}); give a readable safetensors file") from None
        except NOT_JSON:
            raise self._bad("corrupt: its header is not JSON") from None
        if not isinstance(header, dict):
            raise self._bad("corrupt: its header is not a JSON object")
        about = header.pop("__metadata__", None)
        self.metadata: dict[str, str] = about if isinstance(about, dict) else {}
        entries = {name: self._entry(name, given, size) for name, given in header.items()}
        # An empty tensor may begin where another does; it comes first.
        self.entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
        at = self.head
        for name, entry in self.entries.items():
            if entry.begin != at:
                raise self._bad(f"corrupt: tensor {name} {'overlaps another' if entry.begin < at else 'has a gap before it'}")
            at = entry.end
        if at != size:
            raise self._bad(f"corrupt: {size - at} bytes follow its last tensor")

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own."""
        return read(self.entries[name])

    def _bad(self, what: str) -> BadInput:
        return BadInput(f"{self.path} is {what}; fetch or save it again")

    def _entry(self, name: str, e: Any, size: int) -> Entry:
        try:
            kind, shape, (begin, end) = e["dtype"], tuple(e["shape"]), e["data_offsets"]
            if not isinstance(kind, str) or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                raise ValueError
            if math.prod(n or 1 for n in shape) > MOST:  # of an empty tensor the bytes do not bound it
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise self._bad(f"corrupt: the header entry of tensor {name} is malformed") from None
        if kind not in DTYPES:
            raise BadInput(f"{self.path}: tensor {name} has dtype {kind}; trimtab reads {', '.join(DTYPES)}")
        if end - begin != math.prod(shape) * DTYPES[kind].itemsize:
            raise self._bad(f"corrupt: tensor {name} takes {end - begin} bytes, {kind} {list(shape)} would take "
                            f"{math.prod(shape) * DTYPES[kind].itemsize}")
        if self.head + end > size:
            raise self._bad(f"truncated: tensor {name} ends at byte {self.head + end}, the file at {size}")
        return Entry(self.path, DTYPES[kind], shape, self.head + begin, self.head + end)


class Checkpoint:
    """A directory of `config.json`, safetensors weights and whatever else belongs to the model.

    path, config; `tensors`: {name: Entry} in file order; `files`: the weight files; `metadata` of each; `other_files`: what to carry over
    (tokenizer and the like, no pickles, no second copies of the weights). Of a packed directory, `packed` describes its
    layers by name; their weights are among the tensors as what they stand for, an Entry that lies nowhere. So are those of the
    layers that another program `quantized`, whose own tensors are in `stored` alone, with all others of the files.
    """

    def __init__(self, path: Path, config: dict[str, Any], files: list[Path]):
        self.path, self.config, self.files = path, config, files
        self.tensors: dict[str, Entry] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        for f in files:
            inside = SafeFile(f)
            self.metadata[f] = inside.metadata
            for name, e in inside.entries.items():
                if name in self.tensors:
                    raise BadInput(f"tensor {name} is in both {self.tensors[name].file.name} and {f.name} of {path}; keep one")
                self.tensors[name] = e
        self.stored = dict(self.tensors)
        self.packed, self.buffers = self._packed()
        self.quantized = self._quantized()
        self.weight_bytes = sum(os.stat(f).st_size for f in files)
        self.sharded = files != [path / SINGLE]

    def _packed(self) -> tuple[dict[str, Any], dict[str, dict[str, Entry]]]:
        """Descriptions of the packed layers, and their buffers, which leave `tensors` for the weights they stand for."""
        about = self.config.get("quantization_config")
        if not isinstance(about, dict) or about.get("quant_method") != "trimtab":
            return {}, {}
        version, linears = about.get("version"), about.get("linears")
        if type(version) is int and version > VERSION:
            raise BadInput(f"{self.path} was packed by a newer trimtab (layout {version}; this one reads {VERSION}); update trimtab")
        if type(version) is int and 0 < version < VERSION:
            raise BadInput(f"{self.path} was packed by an older trimtab (layout {version}; this one reads {VERSION}); pack it again")
        if version != VERSION or not isinstance(linears, dict):
            raise BadInput(f"{self.path / 'config.json'} does not say what is packed: its quantization_config is corrupt; fetch it again")
        buffers: dict[str, dict[str, Entry]] = {name: {} for name in linears}
        for full in [n for n in self.tensors if PACKED in n]:
            name, _, buffer = full.rpartition(PACKED)
            if name not in buffers:
                raise BadInput(f"tensor {full} of {self.path} belongs to no packed layer of its config.json; fetch it again")
            buffers[name][buffer] = self.tensors.pop(full)
        shared = about.get(SHARED, {})
        for full, other in shared.items() if isinstance(shared, dict) else [("", shared)]:
            name, _, buffer = full.rpartition(PACKED)
            if not isinstance(other, str) or PACKED not in other or other not in self.stored or name not in buffers or full in self.stored:
                raise BadInput(f"{self.path / 'config.json'} says that {full[:99]!r} lies under the name {str(other)[:99]!r}, where no "
                               "buffer of another layer is stored; fetch or pack it again")
            buffers[name][buffer] = self.stored[other]
        for name, about in linears.items():
            said = about if isinstance(about, dict) else {}
            factored, shape = "factors" in said, said.get("shape")
            values = next((e for k, e in sorted(buffers[name].items()) if (k.endswith("_values") if factored else k == "values")), None)
            if values is None or f"{name}.weight" in self.tensors or not isinstance(shape, list):
                raise BadInput(f"packed layer {name} of {self.path} is not stored as its config.json says; fetch it again")
            dtype = values.dtype if values.dtype.is_floating_point and not factored else torch.float32
            self.tensors[f"{name}.weight"] = Entry(values.file, dtype, tuple(shape), 0, 0)
        return linears, buffers

    def _quantized(self) -> dict[str, foreign.Quantized]:
        """The layers of another program's quantization_config, whose tensors leave `tensors` for the weights they stand for."""
        about = self.config.get("quantization_config")
        if not isinstance(about, dict) or about.get("quant_method") == "trimtab":
            return {}
        try:
            found = foreign.quantized(self.config, self.stored, lambda n: read(self.stored[n]))
        except BadInput as e:
            raise BadInput(f"{self.path}: {e}") from None
        for name, q in found.items():
            for n in q.stored.values():
                del self.tensors[n]
            self.tensors[f"{name}.weight"] = Entry(self.stored[next(iter(q.stored.values()))].file, q.plain, q.shape, 0, 0)
        return found

    def place(self, name: str, buffer: str) -> str:
        """The stored name of a buffer of a packed layer, which may be that of another one."""
        full = f"{name}{PACKED}{buffer}"
        return full if full in self.stored else str(self.config["quantization_config"][SHARED][full])

    @property
    def plain_bytes(self) -> int:
        """What the files take, or would take with decoded weights where another program quantised them."""
        if not self.quantized:
            return self.weight_bytes
        return sum(e.dtype.itemsize * math.prod(e.shape) for e in self.tensors.values())

    def decoded(self, name: str) -> Codes | Tensor | None:
        """What a weight says that another program quantised: its codes, or, where no grid of ours holds them, its values in float32.
        None for any other weight."""
        q = self.quantized.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        try:
            return None if q is None else q.decoded(lambda n: read(self.stored[n]))
        except BadInput as e:
            raise BadInput(f"layer {name.removesuffix('.weight')} of {self.path}: {e}; fetch it again") from None

    def linear(self, name: str, held: dict[str, Tensor] | None = None) -> Packed:
        """A packed layer, in memory of its own and checked; of layers with one `held`, buffers that they share are in memory once.
        KeyError for an unknown name."""
        held = {} if held is None else held
        for k, e in self.buffers[name].items():
            if (at := self.place(name, k)) not in held:
                held[at] = read(e)
        return described(name, self.packed[name], {k: held[self.place(name, k)] for k in self.buffers[name]})

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Validate the directory without reading the data. BadInput says in one line what is wrong."""
        path = Path(path)
        if not path.is_dir():
            raise BadInput(f"{path} is {'not a directory' if path.exists() else 'missing'}; give a directory with config.json "
                           "and safetensors weights")
        config = read_json(path / "config.json", "give a Hugging Face model directory")
        if (path / SINGLE).exists():
            return Checkpoint(path, config, [path / SINGLE])
        if not (path / INDEX).exists():
            pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
            if pickles:
                raise BadInput(f"{path} holds only pickles ({pickles[0]}); trimtab reads safetensors: re-save with "
                               "save_pretrained(safe_serialization=True)")
            raise BadInput(f"{path} has no weights; {SINGLE}, or {INDEX} and its shards, would be right")
        where = read_json(path / INDEX, "save the model again").get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(s, str) and Path(s).name == s for s in where.values()):
            raise BadInput(f"{path / INDEX} has no weight_map of tensor names to files beside it; save the model again")
        shards = sorted(set(where.values()))
        for s in shards:
            if not (path / s).is_file():
                raise BadInput(f"shard {s}, named in {path / INDEX}, is missing; fetch it again")
        c = Checkpoint(path, config, [path / s for s in shards])
        for name, s in where.items():
            if PACKED not in name and (name not in c.stored or c.stored[name].file.name != s):
                raise BadInput(f"tensor {name} is missing from {path / s}, where {INDEX} puts it; fetch the shard again")
        return c

    @property
    def other_files(self) -> list[Path]:
        """Relative paths, sorted; subfolders too, nothing hidden."""
        found = []
        for folder, folders, names in os.walk(self.path):
            folders[:] = sorted(d for d in folders if not d.startswith("."))
            for name in sorted(names):
                p = (Path(folder) / name).relative_to(self.path)
                weights = p.suffix in COPIES or name.endswith(".index.json") or (p.suffix == ".safetensors" and len(p.parts) == 1)
                weights |= bool(self.quantized) and str(p) in SAYS_HOW
                if not (weights or name.startswith(".")) and (self.path / p).is_file():
                    found.append(p)
        return found

    def check(self, names: Iterable[str]) -> str:
        """BadInput if one of these tensors holds NaN or inf; the digest, from the same pass over the files.

        The digest is sha256 over config.json and the weight files.
        """
        wanted, h, config = set(names), hashlib.sha256(), self.path / "config.json"
        wanted |= {f"{name}{PACKED}{k}" for name, buffers in self.buffers.items() for k in buffers}
        wanted |= {n for q in self.quantized.values() for n in q.stored.values()}
        h.update(f"{config.name}\0{os.stat(config).st_size}\0".encode() + config.read_bytes())
        for f in self.files:
            inside = SafeFile(f)
            h.update(f"{f.name}\0{os.stat(f).st_size}\0".encode())
            for part in _chunks(f, 0, inside.head):
                h.update(part)
            for name, e in inside.entries.items():  # they follow each other without a gap
                look = name in wanted and e.dtype.is_floating_point
                for part in _chunks(f, e.begin, e.end):
                    h.update(part)
                    if look and not finite(torch.frombuffer(part, dtype=e.dtype)):
                        raise not_finite(name, f)
        return h.hexdigest()

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype, in memory of its own; a packed weight as what it stands for, a quantised one as that in the
        model's type. KeyError for an unknown name."""
        if (found := self.decoded(name)) is not None:
            return (found.weight() if isinstance(found, Codes) else found).to(self.tensors[name].dtype)
        if (layer := name.removesuffix(".weight")) in self.packed and name.endswith(".weight"):
            return restored(self.linear(layer))
        return read(self.tensors[name])


def not_finite(name: str, where: Path) -> BadInput:
    return BadInput(f"tensor {name} of {where} holds NaN or inf; only finite weights can be trimmed or run")


def finite(t: Tensor) -> bool:
    """Whether all entries are: NaN and inf show in the extremes, which need no second tensor."""
    t = t.to(torch.float32) if t.dtype.itemsize == 1 else t
    return not t.numel() or all(bool(torch.isfinite(x)) for x in t.aminmax())


def read(e: Entry) -> Tensor:
    raw = torch.empty(e.end - e.begin, dtype=torch.uint8)
    view, at = raw.numpy().data, e.begin
    fd = os.open(e.file, os.O_RDONLY)
    try:
        while view:
            if not (n := os.preadv(fd, [view], at)):
                raise OSError(f"{e.file} ended early at byte {at}; it changed while it was read")
            view, at = view[n:], at + n
    finally:
        os.close(fd)
    return raw.view(e.dtype).view(e.shape)


def write_like(src: Checkpoint, out: Path, replace: Callable[[str], Tensor | None]) -> None:
    """Write `src` into directory `out`: same files, order, metadata and dtypes, with the tensors that `replace` gives.

    One tensor in memory at a time, untouched ones are copied in chunks. ValueError when a shape differs. A source that another
    program quantised is written as plain tensors.
    """
    out.mkdir(parents=True, exist_ok=True)
    if src.quantized:
        def plain(name: str) -> Tensor:
            t = replace(name)
            return src.read(name) if t is None else t.to(src.tensors[name].dtype)

        write_sharded(out, {n: (e.dtype, e.shape) for n, e in src.tensors.items()}, plain, lambda _: {"format": "pt"})
        copy_others(src, out, without=("config.json",))
        write_json(out / "config.json", {k: v for k, v in src.config.items() if k != "quantization_config"})
        return
    for file in src.files:
        entries = {n: e for n, e in src.tensors.items() if e.file == file}
        fd = os.open(out / file.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _copy(file, fd, 0, SafeFile(file).head)
            for name, e in entries.items():
                t = replace(name)
                if t is None:
                    _copy(file, fd, e.begin, e.end)
                elif tuple(t.shape) != e.shape:
                    raise ValueError(f"{name}: got {tuple(t.shape)}, the file holds {e.shape}")
                elif t.numel():
                    flat = t.detach().to("cpu", e.dtype).contiguous().view(-1).view(torch.uint8)
                    _write(fd, flat.numpy().data, e.begin)
            os.fsync(fd)
        finally:
            os.close(fd)
    if src.sharded:
        shutil.copy2(src.path / INDEX, out / INDEX)
        sync(out / INDEX)
    copy_others(src, out)


def copy_others(src: Checkpoint, out: Path, without: tuple[str, ...] = ()) -> None:
    """Everything but the weights, and but these names."""
    for p in src.other_files:
        if str(p) not in without:
            (out / p).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(src.path / p, out / p)
            sync(out / p)
    sync(out)


def _chunks(file: Path, begin: int, end: int) -> Iterator[bytearray]:
    """Bytes begin to end, at most CHUNK at a time (a multiple of every item size)."""
    with open(file, "rb", buffering=0) as f:
        f.seek(begin)
        while begin < end:
            part, got = bytearray(min(CHUNK, end - begin)), 0
            while got < len(part):
                if not (n := f.readinto(memoryview(part)[got:])):
                    raise OSError(f"{file} ended early at byte {begin + got}; it changed while it was read")
                got += n
            yield part
            begin += got


def _copy(file: Path, fd: int, begin: int, end: int) -> None:
    for part in _chunks(file, begin, end):
        _write(fd, memoryview(part), begin)
        begin += len(part)


def _write(fd: int, view: memoryview, at: int) -> None:
    while view:
        n = os.pwrite(fd, view, at)
        view, at = view[n:], at + n


def read_json(path: Path, right: str = "fetch or save it again") -> dict[str, Any]:
    """The object in a file of a model; BadInput says which file holds none, and what would be `right`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path.parent} has no {path.name}; {right}") from None
    except OSError as e:
        raise BadInput(f"{path} cannot be read ({e.strerror or e}); {right}") from None
    except NOT_JSON:
        raise BadInput(f"{path} is not JSON; {right}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} is not a JSON object; {right}")
    return value


def raw(t: Tensor) -> memoryview:
    """The bytes of a tensor as they lie in a file."""
    return t.detach().contiguous().view(-1).view(torch.uint8).numpy().data if t.numel() else memoryview(b"")


def _head(header: dict[str, Any]) -> bytes:
    head = json.dumps(header, sort_keys=False, separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head)) % LINE)
    return len(head).to_bytes(8, "little") + head


def write_safetensors(path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensor: Callable[[str], Tensor],
                      metadata: dict[str, str] | About) -> None:
    """A safetensors file of the dtypes and shapes in `entries`, in their order; one tensor in memory at a time.

    `metadata` may be a function of the tensors' sha256 by name, taken while they are written; its length must not depend on them.
    """
    code = {v: k for k, v in DTYPES.items()}
    sums = dict.fromkeys(entries, "0" * 64)
    about = metadata if callable(metadata) else lambda _: metadata
    header: dict[str, Any] = {"__metadata__": said} if (said := about(sums)) else {}
    at = 0
    for name, (dtype, shape) in entries.items():
        header[name] = {"dtype": code[dtype], "shape": list(shape), "data_offsets": [at, at + math.prod(shape) * dtype.itemsize]}
        at = header[name]["data_offsets"][1]
    head = _head(header)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for name, (dtype, shape) in entries.items():
            t = tensor(name)
            if t.dtype != dtype or tuple(t.shape) != tuple(shape):
                raise ValueError(f"{name}: got {t.dtype} {tuple(t.shape)}, announced {dtype} {tuple(shape)}")
            view = raw(t)
            if callable(metadata):
                sums[name] = hashlib.sha256(view).hexdigest()
            _write(fd, view, len(head) + header[name]["data_offsets"][0])
        if callable(metadata):
            header["__metadata__"] = metadata(sums)
        if len(last := _head(header)) != len(head):
            raise ValueError(f"{path}: its metadata changed their length")
        _write(fd, memoryview(last), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_sharded(out: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensor: Callable[[str], Tensor],
                  about: About, limit: int = SHARD) -> list[Path]:
    """The weights of a directory: one file, or shards of about `limit` bytes with their index. `about`: a file's metadata, from
    the sha256 of its tensors by name, as `write_safetensors` has it. Returns the files.

    Tensors that fill whole cache lines come first, the others by item size, so that all but a few small ones begin on one
    and every one on its own item size: they can be mapped.
    """
    sizes = {n: dtype.itemsize * math.prod(shape) for n, (dtype, shape) in entries.items()}
    files: list[list[str]] = [[]]
    held = 0
    for n in entries:
        if files[-1] and held + sizes[n] > limit:
            files.append([])
            held = 0
        files[-1].append(n)
        held += sizes[n]
    where: dict[str, str] = {}
    for k, names in enumerate(files, 1):
        file = SINGLE if len(files) == 1 else f"model-{k:05d}-of-{len(files):05d}.safetensors"
        names.sort(key=lambda n: (sizes[n] % LINE != 0, -entries[n][0].itemsize if sizes[n] % LINE else 0))
        write_safetensors(out / file, {n: entries[n] for n in names}, tensor, about)
        where |= dict.fromkeys(names, file)
    if len(files) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
    sync(out)
    return [out / file for file in sorted(set(where.values()))]
