"""Files that lie about themselves, would execute something, or take much memory."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from resnet_backbone.weights import readers
from resnet_backbone.weights.readers import read_tensors
from tests.weights.containers import WRITERS, assert_same, formats, legacy, python2, refusal


def safetensors_file(path, header, data: bytes = bytes(16), length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def claim(dtype, shape, start, stop) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "header",
    [
        {"w": claim("F32", [4], 0, 32)},
        {"w": claim("F32", [8], 0, 32)},
        {"w": claim("F32", [2], 0, 8)},
        {"w": claim("F64", [4], 0, 16)},
        {"a": claim("F32", [3], 0, 12), "b": claim("F32", [2], 8, 16)},
        {"a": claim("F32", [4], 0, 16), "b": claim("F32", [4], 0, 16)},
        {"a": claim("F32", [1], 0, 4), "b": claim("F32", [2], 8, 16)},
        {"w": claim("F32", [-2, -2], 0, 16)},
        {"w": claim("F32", [4], -16, 0)},
        {"w": claim("F32", [4.0], 0, 16)},
        {"w": claim("F32", [10**30], 0, 16)},
        {"w": claim("F999", [4], 0, 16)},
        {"w": claim("I32", [4], 0, 16)},
        {"w": {"dtype": "F32", "shape": [4]}},
        {"w": 3},
        {"w": claim("F32", [4], 0, 16), "__metadata__": {"a": 1}},
        {"w": claim("F32", [4], 0, 16), "__metadata__": 1},
        b'{"w": ',
        b"{" * 100_000,
        b'{"\xff": 1}',
        b'{"w": 1, "w": 2}',
    ],
)
def test_a_safetensors_header_that_lies(tmp_path, header):
    safetensors_file(tmp_path / "x", header)
    message = refusal(tmp_path / "x")
    assert "Error while deserializing header" in message or "dtype int32, 'w'" in message


def test_a_safetensors_header_that_claims_too_much(tmp_path):
    for length in (100, 10 * 10**9, 2**47):
        safetensors_file(tmp_path / "x", {"w": claim("F32", [4], 0, 16)}, length=length)
        message = refusal(tmp_path / "x")
        assert "invalid header length" in message or "header too large" in message


# Hostile files.


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write_malicious(path, how: str, payload: object) -> None:
    if how == "npz":
        with path.open("wb") as file:
            np.savez(file, w=np.array([payload], dtype=object), allow_pickle=True)
    elif how.startswith("pickle"):
        path.write_bytes(pickle.dumps({"model": payload}, int(how[-1])))
    else:
        WRITERS[how]({"model": payload}, path)


def load_naively(path, how: str) -> None:
    if how == "npz":
        np.load(path, allow_pickle=True)["w"]
    elif how.startswith("pickle"):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)


@pytest.mark.parametrize("how", ["pickle2", "pickle4", "torch", "legacy", "npz"])
def test_nothing_is_executed(tmp_path, how):
    path, trace = tmp_path / "x", tmp_path / "executed"
    write_malicious(path, how, Malicious(trace))
    message = refusal(path)
    assert "nothing in it was executed" in message
    assert "'posix.system'" in message or (how == "npz" and "Object arrays cannot be loaded" in message)
    assert not trace.exists()
    load_naively(path, how)
    assert trace.exists()  # it would have


def test_an_array_of_objects_in_a_pickle_is_not_executed(tmp_path):
    trace = tmp_path / "executed"
    (tmp_path / "x").write_bytes(pickle.dumps({"w": np.array([Malicious(trace)], dtype=object)}, 2))
    assert "an array of 'O8', expected numbers" in refusal(tmp_path / "x")
    assert not trace.exists()


def edit_torch(path, target, old: bytes, new: bytes) -> None:
    """Copy a torch archive with another pickle, whole in every other respect."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for member in source.infolist():
            content = source.read(member)
            if member.filename.endswith("data.pkl"):
                assert old in content
                content = content.replace(old, new)
            copy.writestr(member.filename, content)


def test_a_tensor_beyond_its_storage(tmp_path):
    path, forged = tmp_path / "x", tmp_path / "forged"
    torch.save({"w": torch.arange(4.0)}, path)
    edit_torch(path, forged, b"K\x04tq", b"M\x00\x20tq")  # the storage's number of values
    # No tensor uses what is claimed beyond its data.
    assert_same(read_tensors(forged).tensors, {"w": torch.arange(4.0)})
    for old, new in (
        (b"K\x04\x85", b"M\x00\x20\x85"),  # the tensor's shape
        (b"K\x04\x85", b"J\xff\xff\xff\xff\x85"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009"),  # the storage's name
    ):
        edit_torch(path, forged, old, new)
        assert "is cut off, damaged" in refusal(forged)
    edit_torch(path, forged, b"K\x04tq", b"K\x04tq")
    assert_same(read_tensors(forged).tensors, {"w": torch.arange(4.0)})


def test_a_legacy_file_that_claims_more_than_it_has(tmp_path):
    path = tmp_path / "x"
    legacy({"w": torch.arange(4.0)}, path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"K\x04N", b"M\x00\x20N"))
    assert "storage has wrong byte size" in refusal(path)
    path.write_bytes(content[:-24] + struct.pack("<q", 8) + content[-16:])
    assert "storage has wrong byte size" in refusal(path)
    path.write_bytes(content + b"more")
    assert "4 bytes follow its last tensor" in refusal(path)


def test_archives_that_no_library_writes(tmp_path):
    path = tmp_path / "x"
    torch.save({"w": torch.arange(4.0)}, path)
    with zipfile.ZipFile(path) as source:
        members = {member.filename: source.read(member) for member in source.infolist()}
    for method, words in ((zipfile.ZIP_DEFLATED, "compresses nothing"), (zipfile.ZIP_LZMA, "another compression")):
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        assert words in refusal(path)


@formats
def test_the_bound_is_the_tensors_length(tmp_path, write, monkeypatch):
    write({"a": torch.ones(1000), "b": torch.ones(10, dtype=torch.float64)}, tmp_path / "x")
    monkeypatch.setattr(readers, "MOST_BYTES", 4079)
    assert "unpacks to 4,080 bytes of tensors, at most 4,079" in refusal(tmp_path / "x")
    monkeypatch.setattr(readers, "MOST_BYTES", 4080)
    assert len(read_tensors(tmp_path / "x").tensors) == 2


# Files that would take much memory.


def npz_bomb(path, shape: int, zeros: int, claimed: int | None = None) -> None:
    """An archive with an array of `shape` values in its header, `zeros` bytes of data, and another claimed length."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (shape,)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("w.npy", "w", force_zip64=True) as file:
            file.write(header.getvalue())
            for _ in range(zeros >> 20):
                file.write(bytes(2**20))
        if claimed is not None:
            archive.filelist[0].file_size = len(header.getvalue()) + claimed  # goes into the table of contents


def crowded_zip(path, large: bool) -> None:
    """An archive of many members without content; the large format says so in a second record, which counts."""
    entry = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, 20, 0, 0, 0, 0x21, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0)
    table = b"".join(entry + b"%05d" % i for i in range(90_000))
    end, claimed = b"", len(table)
    if large:
        end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 90_000, 90_000, len(table), 4)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, 4 + len(table), 1)
        claimed = 0
    end += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0, 0, claimed, 4, 0)
    path.write_bytes(b"PK\3\4" + table + end)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 90_000


class Called:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def instructions(*parts: bytes):
    return lambda path: path.write_bytes(b"\x80\x02" + b"".join(parts) + b".")


def number(value: int) -> bytes:
    return b"\x8a\x06" + value.to_bytes(6, "little")


def legacy_bomb(path) -> None:
    legacy({"w": torch.arange(4.0)}, path)
    path.write_bytes(path.read_bytes().replace(b"K\x04N", number(10**13) + b"N"))


def torch_bomb(path) -> None:
    torch.save({"w": torch.arange(4.0)}, path)
    edit_torch(path, path.with_suffix(".forged"), b"K\x04tq", number(10**13) + b"tq")
    os.replace(path.with_suffix(".forged"), path)


TERABYTES = torch.zeros(1).expand(10**6, 10**6)  # one number
LENT = b"}(U\x01w" + python2(np.zeros(2**20, np.float32)) + b"q\x00"
LENT += b"".join(python2(f"{i}") + b"h\x00" for i in range(999)) + b"u"
BOMBS = {
    "npz of zeros": (lambda path: npz_bomb(path, 2**26, 2**28), "unpacks to 268,435,"),
    "npz that claims terabytes": (lambda path: npz_bomb(path, 2**40, 2**20, 2**42), "unpacks to 4,398,046,511,"),
    "npz that claims too little": (lambda path: npz_bomb(path, 1000, 2**28, 4000), "Bad CRC"),
    "many members": (lambda path: crowded_zip(path, False), "not torch's or NumPy's"),
    "many members, large": (lambda path: crowded_zip(path, True), "not torch's or NumPy's"),
    "torch's storage": (torch_bomb, "tensor([0., 1., 2., 3.])"),
    "the older storage": (legacy_bomb, "cut off, damaged"),
    "expanded": (lambda path: torch.save({"w": TERABYTES}, path), "unpacks to 4,000,000,000,000"),
    "expanded, older": (lambda path: legacy({"w": TERABYTES}, path), "unpacks to 4,000,000,000,000"),
    "bytearray": (lambda path: torch.save({"w": Called(bytearray, 10**12)}, path), "__builtin__.bytearray"),
    "bytearray, older": (lambda path: legacy({"w": Called(bytearray, 10**12)}, path), "__builtin__.bytearray"),
    "bytes": (instructions(b"c__builtin__\nbytes\n", number(10**12), b"\x85R"), "damaged"),
    "an array's shape": (
        instructions(
            b"}U\x01wcnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(",
            number(2**20) * 2,
            b"tU\x01btRs",
        ),
        "dtype uint8, 'w'",
    ),
    "lists that double": (instructions(b"]q\x00", b"](h\x00h\x00eq\x00" * 60, b"}U\x01wh\x00s"), "has list 'w'"),
    "text that doubles": (
        instructions(b"U\x01wq\x00", b"c_codecs\nencode\nh\x00U\x09hex_codec\x86Rq\x00" * 60),
        "another code than latin1",
    ),
    "one array under many names": (instructions(LENT), "unpacks to 4,194,304,000 bytes"),
    "many dicts": (instructions(b"}" * 3_000_000), "1,000,000 operations"),
    "a place far away": (instructions(b"}r\xff\xff\xff\xff"), "damaged"),
    "long bytes": (instructions(b"\x8e", (2**62).to_bytes(8, "little"), b"x"), "damaged"),
    "long text": (instructions(b"\x8d", (2**40).to_bytes(8, "little"), b"x"), "damaged"),
    "a long number": (instructions(b"\x8b", (2**31 - 1).to_bytes(4, "little"), b"x"), "damaged"),
    "a long string": (instructions(b"T", (2**31 - 1).to_bytes(4, "little"), b"x"), "damaged"),
    "safetensors' header": (
        lambda path: safetensors_file(path, {"w": claim("F32", [4], 0, 16)}, length=10 * 10**9),
        "header too large",
    ),
    "safetensors' shape": (
        lambda path: safetensors_file(path, {"w": claim("F32", [10**12], 0, 4 * 10**12)}),
        "Error while deserializing header",
    ),
}


def test_memory_is_bounded(tmp_path):
    """In a process that may take 300 MB more than it has; what it took in fact is looked at, too."""
    for i, (write, _) in enumerate(BOMBS.values()):
        write(tmp_path / f"{i}")
    for name, write in WRITERS.items():
        write({"w": torch.ones(3)}, tmp_path / name)
    script = """
import json, pathlib, resource, sys
from resnet_backbone.weights import CheckpointError
from resnet_backbone.weights.readers import read_tensors
folder, count, honest = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
for name in honest:  # whatever libraries load at their first use
    read_tensors(folder / name)
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 300 * 10**6
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
results = []
for i in range(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        message = str(read_tensors(folder / str(i)))
    except CheckpointError as error:
        message = str(error)
    results.append((message, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
print(json.dumps(results))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(len(BOMBS)), *WRITERS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for (name, (_, words)), (message, kilobytes) in zip(BOMBS.items(), json.loads(done.stdout), strict=True):
        assert words in message, (name, message)
        assert kilobytes < 150_000, (name, kilobytes)
