import argparse
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
import safetensors.torch
import torch
from torch import nn

from resnet_backbone.weights import CheckpointError, write_checkpoint
from resnet_backbone.weights.checkpoint import Checkpoint
from resnet_backbone.weights.readers import read_tensors


def arrays() -> dict[str, np.ndarray]:
    """Of every type that NumPy shares with the networks, in both layouts."""
    generator = np.random.default_rng(0)
    return {
        "conv1_w": generator.standard_normal((4, 3, 5, 5), np.float32),
        "half": generator.standard_normal(7).astype(np.float16),
        "double": generator.standard_normal((2, 3)),
        "fortran": np.asfortranarray(generator.standard_normal((3, 4), np.float32)),
        "count": np.array(2**40),
        "empty": np.zeros((0, 3), np.float32),
    }


def tensors() -> dict[str, torch.Tensor]:
    """The same and bfloat16."""
    return {name: torch.from_numpy(a.copy()) for name, a in arrays().items()} | {"bf16": torch.randn(7).bfloat16()}


def legacy(state, path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def bare_pickle(state, path, protocol=2) -> None:
    path.write_bytes(pickle.dumps({n: np.asarray(v) for n, v in state.items()}, protocol))


def npz(state, path) -> None:
    with path.open("wb") as file:  # a path would get the suffix .npz
        np.savez(file, **{name: np.asarray(value) for name, value in state.items()})


def npz_compressed(state, path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **{name: np.asarray(value) for name, value in state.items()})


WRITERS = {
    "torch": torch.save,
    "legacy": legacy,
    "safetensors": safetensors.torch.save_file,
    "pickle": bare_pickle,
    "npz": npz,
    "npz_compressed": npz_compressed,
}
formats = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def refusal(path, **arguments) -> str:
    """The sentence with which reading `path` is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and str(path) in message and len(message) < 600
    return message


def assert_same(found, expected) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        tensor = torch.from_numpy(np.array(tensor)) if isinstance(tensor, np.ndarray) else tensor
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


# Honest files, written by the formats' own libraries.


def test_torch(tmp_path):
    path = tmp_path / "x"
    for write in (torch.save, legacy):
        write(tensors(), path)
        read = read_tensors(path)
        assert read.container == "torch" and read.header == {}
        assert_same(read.tensors, torch.load(path, weights_only=True))
        assert list(read.tensors) == list(tensors())


@pytest.mark.parametrize("write", [torch.save, legacy])
def test_a_modules_state_dict_as_torch_saves_it(tmp_path, write):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    write(net.state_dict(), tmp_path / "x")  # an OrderedDict with versions of modules
    assert_same(read_tensors(tmp_path / "x").tensors, net.state_dict())
    write(dict(net.named_parameters()), tmp_path / "x")
    read = read_tensors(tmp_path / "x").tensors
    assert_same(read, {n: p.detach() for n, p in net.named_parameters()})
    assert not any(tensor.requires_grad or isinstance(tensor, nn.Parameter) for tensor in read.values())


@pytest.mark.parametrize("write", [torch.save, legacy])
def test_tensors_own_their_memory(tmp_path, write):
    """Tied tensors, a slice of a larger tensor and a transposed one come apart."""
    large = torch.randn(1000, 4)
    state = {"a": large[:2], "b": large[:2], "c": large[1:3].t()}
    write(state, tmp_path / "x")
    read = read_tensors(tmp_path / "x").tensors
    assert_same(read, state)
    assert all(t.untyped_storage().nbytes() == t.nbytes and t.is_contiguous() for t in read.values())
    read["a"].zero_()
    assert torch.equal(read["b"], state["b"])


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "state_dict_ema"])
@pytest.mark.parametrize("write", [torch.save, legacy])
def test_wrappers_and_what_lies_beside(tmp_path, write, wrapper):
    """The training checkpoint of a reference script: the network, its optimizer, and plain entries."""
    net = nn.DataParallel(nn.Conv2d(3, 4, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.ones(1, 3, 3, 3)).sum().backward()
    optimizer.step()
    payload = {"epoch": 3, "arch": "resnet50", "best": 76.1, "amp": False, "optimizer": optimizer.state_dict()}
    write({**payload, wrapper: net.state_dict()}, tmp_path / "x")
    read = read_tensors(tmp_path / "x")
    assert_same(read.tensors, net.module.state_dict())
    assert read.header == {"epoch": 3, "arch": "resnet50", "best": 76.1, "amp": False}


def test_a_prefix_that_not_all_names_have_stays(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x")
    assert list(read_tensors(tmp_path / "x").tensors) == ["module.a", "b"]


def test_numbers_beside_the_tensors(tmp_path):
    torch.save({"epoch": 90, "w": torch.ones(1)}, tmp_path / "x")
    read = read_tensors(tmp_path / "x")
    assert list(read.tensors) == ["w"] and read.header == {"epoch": 90}


def test_safetensors(tmp_path):
    safetensors.torch.save_file(tensors(), tmp_path / "x", metadata={"origin": "Å"})
    read = read_tensors(tmp_path / "x")
    assert read.container == "safetensors" and read.header == {"origin": "Å"}
    assert_same(read.tensors, safetensors.torch.load_file(tmp_path / "x"))
    (tmp_path / "x").write_bytes(bytes(10_000))  # the tensors do not change with the file
    assert_same(read.tensors, {**tensors(), "bf16": read.tensors["bf16"]})
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in read.tensors.values())


@pytest.mark.parametrize("length", [0x4B50, 0x0280])
def test_safetensors_that_start_like_a_zip_archive_or_a_pickle(tmp_path, length):
    """The first bytes are the header's length, which may read PK or \\x80\\x02."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(length)
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + header + struct.pack("<2f", 1, 2))
    assert_same(read_tensors(tmp_path / "x").tensors, safetensors.torch.load_file(tmp_path / "x"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles(tmp_path, protocol):
    """Detectron2's own form, of any protocol; the header holds NumPy's numbers as Python's."""
    payload = {"model": arrays(), "__author__": "Å", "matching_heuristics": True, "lr": np.float32(0.5), "other": [1]}
    (tmp_path / "x").write_bytes(pickle.dumps(payload, protocol))
    read = read_tensors(tmp_path / "x")
    assert read.container == "pickle"
    assert read.header == {"__author__": "Å", "matching_heuristics": True, "lr": 0.5}
    assert_same(read.tensors, arrays())
    assert list(read.tensors) == list(arrays())
    bare_pickle(arrays(), tmp_path / "x", protocol)
    assert_same(read_tensors(tmp_path / "x").tensors, arrays())


def test_big_endian_and_tied_arrays(tmp_path):
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    for write in (bare_pickle, npz):
        write({"a": array, "b": array}, tmp_path / "x")
        read = read_tensors(tmp_path / "x").tensors
        assert_same(read, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(6.0).reshape(2, 3)})
        assert read["a"].data_ptr() != read["b"].data_ptr()


def python2(value) -> bytes:
    """A pickle's instructions for `value` as Python 2.7 and NumPy 1 write them: text and data as byte strings."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(k) + python2(v) for k, v in value.items()) + b"u"
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode("latin1")
    if isinstance(value, tuple):
        return b"(" + b"".join(map(python2, value)) + b"t"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if value is None:
        return b"N"
    data = value.tobytes(order="A")
    dtype = b"cnumpy\ndtype\n" + python2((value.dtype.str[1:], False, True)) + b"R"
    dtype += python2((3, "<", None, None, None, -1, -1, 0)) + b"b"
    state = [python2(1), python2(value.shape), dtype, python2(not value.flags.c_contiguous)]
    state.append(b"T" + struct.pack("<i", len(data)) + data)
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        + python2((0,))
        + python2("b")
        + b"tR("
        + b"".join(state)
        + b"tb"
    )


def test_caffe2s_pickles_of_python_2(tmp_path):
    path = tmp_path / "R-50.pkl"
    path.write_bytes(b"\x80\x02" + python2({"blobs": arrays(), "cfg": "caf\xe9"}) + b".")
    reference = pickle.loads(path.read_bytes(), encoding="latin1")
    read = read_tensors(path)
    assert read.header == {"cfg": "caf\xe9"} == {"cfg": reference["cfg"]}
    assert_same(read.tensors, reference["blobs"])
    assert_same(read.tensors, arrays())


def test_python_2s_ordered_dict(tmp_path):
    items = b"".join(b"](" + python2(name) + python2(value) + b"e" for name, value in arrays().items())
    (tmp_path / "x").write_bytes(b"\x80\x02ccollections\nOrderedDict\n](" + items + b"e\x85R.")
    assert_same(read_tensors(tmp_path / "x").tensors, arrays())


def test_npz(tmp_path):
    for write in (npz, npz_compressed):
        write({**arrays(), "conv1_conv/kernel:0": np.ones(3, np.float32)}, tmp_path / "x")
        read = read_tensors(tmp_path / "x")
        assert read.container == "npz" and read.header == {}
        with np.load(tmp_path / "x") as reference:
            assert_same(read.tensors, dict(reference))
            assert list(read.tensors) == list(reference)


def test_this_projects_checkpoint(tmp_path, metadata):
    write_checkpoint(tmp_path / "x", Checkpoint(tensors(), metadata(), 41, {"seed": 7}))
    read = read_tensors(tmp_path / "x")
    assert read.container == "resnet_backbone" and read.header["iteration"] == 41
    assert_same(read.tensors, torch.load(tmp_path / "x", weights_only=True)["model"])
    torch.save({"format": "resnet_backbone", "version": 99, "model": tensors()}, tmp_path / "x")
    assert "version 99" in refusal(tmp_path / "x")


# Damaged files.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"\x89HDF\r\n\x1a\n", "no file of weights that is known"),
        (b"PK\x03\x04 and then something else", "cut off or damaged"),
        (b"PK\x05\x06" + bytes(18), "holds no tensors"),
        (b"\x80\x02", "cut off or damaged"),
        (b"\x80\x02}.", "holds no tensors"),
        (b"\x80\x02}.}.", "a pickle with 2 bytes after its end"),
        (b"\x80\x02N.", "holds a NoneType"),
    ],
)
def test_foreign_files(tmp_path, content, words):
    (tmp_path / "model.pth").write_bytes(content)
    assert words in refusal(tmp_path / "model.pth")


def test_missing_files_and_folders(tmp_path):
    (tmp_path / "R-50.pkl").write_bytes(b"")
    assert "its folder has R-50.pkl" in refusal(tmp_path / "R-51.pkl")
    assert "it is a folder" in refusal(tmp_path)


@formats
def test_truncated_files(tmp_path, write):
    path = tmp_path / "x"
    write({k: v for k, v in tensors().items() if k != "bf16"}, path)
    content = path.read_bytes()
    for length in {*range(1, 40, 3), *range(40, len(content), len(content) // 40), len(content) - 1}:
        path.write_bytes(content[:length])
        message = refusal(path)
        assert any(words in message for words in ("cut off", "damaged", "no file of weights that is known")), message


@formats
def test_flipped_bytes_end_in_a_sentence_or_in_other_numbers(tmp_path, write):
    path = tmp_path / "x"
    write({"first": torch.randn(3, 4), "second": torch.randn(5)}, path)
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), max(1, len(content) // 150)):
        for mask in (0x01, 0x80):
            path.write_bytes(content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :])
            try:
                read = read_tensors(path)
            except CheckpointError:
                refused += 1
            else:
                assert all(t.isfinite().all() and t.numel() <= 12 for t in read.tensors.values())
    assert refused > 20


@formats
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers(tmp_path, write, value):
    write({"good": torch.ones(2), "bad.weight": torch.tensor([[1.0, value]])}, tmp_path / "x")
    assert "NaN or infinite values in 'bad.weight'" in refusal(tmp_path / "x")


def test_nan_in_this_projects_checkpoint(tmp_path, checkpoint):
    write_checkpoint(tmp_path / "x", checkpoint)  # whose tensor "special" has one
    assert "NaN or infinite values in 'special'" in refusal(tmp_path / "x")


@formats
def test_tensors_that_are_no_weights(tmp_path, write):
    path = tmp_path / "x"
    write({"good": torch.ones(1), "bad": torch.ones(2, dtype=torch.int32)}, path)
    assert "dtype int32, 'bad'" in refusal(path) or "dtype i4, 'bad'" in refusal(path) or "I32, 'bad'" in refusal(path)
    write({"bad": torch.ones(1, 1, 1, 1, 1, 1)}, path)
    assert "6 dimensions, 'bad'" in refusal(path)
    if write is not npz_compressed:
        write({}, path)
        assert "holds no tensors" in refusal(path)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "cut off or damaged"),
        ({"w": torch.ones(1), "optimizer": {}}, "has dict 'optimizer' among its tensors"),
        ({"state_dict": {"w": torch.ones(1), "epoch": 3}}, "has int 'epoch' among its tensors"),
        ({"model": {3: torch.ones(1)}}, "has Tensor '3' among its tensors"),
        ({"model": {"w": torch.ones(1)}, "state_dict_ema": {"w": torch.ones(1)}}, "'model' and 'state_dict_ema'"),
        ({"model": {}}, "holds no tensors"),
        ({"model": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=0.1)}, "asks for 'argparse.Namespace'"),
        (nn.Conv2d(1, 1, 1), "asks for 'torch.nn.modules.conv.Conv2d'"),
    ],
)
def test_torch_files_of_something_else(tmp_path, payload, words):
    for write in (torch.save, legacy):
        write(payload, tmp_path / "x")
        message = refusal(tmp_path / "x")
        assert words in message or (isinstance(payload, torch.Tensor) and "holds a Tensor" in message)


def test_other_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "a zip archive with 'readme.txt'" in refusal(tmp_path / "x")
    torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.ones(1, 1, 1, 1)), tmp_path / "x")
    assert "TorchScript" in refusal(tmp_path / "x")


def test_a_wrong_npy_header(tmp_path):
    path = tmp_path / "x"

    def refused(content: bytes) -> str:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("w.npy", content)
        return refusal(path)

    file = io.BytesIO()
    np.save(file, np.ones((2, 3), np.float32))
    content = file.getvalue()
    assert "does not fit the 24 bytes" in refused(content.replace(b"(2, 3)", b"(2, 4)"))
    assert "does not fit the 24 bytes" in refused(content.replace(b"(2, 3)", b"(-2,-3)").replace(b"  \n", b" \n"))
    assert "does not fit the 24 bytes" in refused(content.replace(b"<f4", b"<f8"))
    assert "does not fit the 20 bytes" in refused(content[:-4])
    assert "header of its array 'w' is not NumPy's" in refused(content.replace(b"'shape'", b"'shade'"))
    assert "header of its array 'w' is not NumPy's" in refused(b"\x93NUMPX" + content[6:])
    assert "header of its array 'w' is not NumPy's" in refused(content.replace(b"NUMPY\x01", b"NUMPY\x02"))
    assert "header of its array 'w' is not NumPy's" in refused(content[:40])


def safetensors_file(path, header, data: bytes = bytes(16), length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def claim(dtype, shape, start, stop) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"w": claim("F32", [4], 0, 32)}, "needs 16 bytes and claims those from 0 to 32"),
        ({"w": claim("F32", [8], 0, 32)}, "its tensors take 32 bytes, the file has 16"),
        ({"w": claim("F32", [2], 0, 8)}, "its tensors take 8 bytes, the file has 16"),
        ({"w": claim("F64", [4], 0, 16)}, "needs 32 bytes"),
        ({"a": claim("F32", [3], 0, 12), "b": claim("F32", [2], 8, 16)}, "expected a start at 12"),
        ({"a": claim("F32", [4], 0, 16), "b": claim("F32", [4], 0, 16)}, "expected a start at 16"),
        ({"a": claim("F32", [1], 0, 4), "b": claim("F32", [2], 8, 16)}, "expected a start at 4"),
        ({"w": claim("F32", [-2, -2], 0, 16)}, "impossible"),
        ({"w": claim("F32", [4], -16, 0)}, "impossible"),
        ({"w": claim("F32", [4.0], 0, 16)}, "impossible"),
        ({"w": claim("F32", [10**30], 0, 16)}, "needs 4,000,"),
        ({"w": claim("F999", [4], 0, 16)}, "dtype F999"),
        ({"w": claim("I32", [4], 0, 16)}, "dtype I32"),
        ({"w": {"dtype": "F32", "shape": [4]}}, "another description"),
        ({"w": 3}, "another description"),
        ({"w": claim("F32", [4], 0, 16), "__metadata__": {"a": 1}}, "metadata"),
        ({"w": claim("F32", [4], 0, 16), "__metadata__": 1}, "metadata"),
        (b'{"w": ', "not JSON"),
        (b"{" * 100_000, "not JSON"),
        (b'{"\xff": 1}', "not JSON"),
        (b'{"w": 1, "w": 2}', "a name occurs twice"),
    ],
)
def test_a_safetensors_header_that_lies(tmp_path, header, words):
    safetensors_file(tmp_path / "x", header)
    assert words in refusal(tmp_path / "x")


def test_a_safetensors_header_that_claims_too_much(tmp_path):
    for length in (100, 10 * 10**9, 2**47):
        safetensors_file(tmp_path / "x", {"w": claim("F32", [4], 0, 16)}, length=length)
        assert f"header claims {length:,} bytes" in refusal(tmp_path / "x")


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
    assert "'posix.system'" in message or (how == "npz" and "Python objects" in message)
    assert not trace.exists()
    load_naively(path, how)
    assert trace.exists()  # it would have


def test_an_array_of_objects_in_a_pickle_is_not_executed(tmp_path):
    trace = tmp_path / "executed"
    (tmp_path / "x").write_bytes(pickle.dumps({"w": np.array([Malicious(trace)], dtype=object)}, 2))
    assert "an array of Python objects" in refusal(tmp_path / "x")
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
    assert "should be 32,768 bytes long and are 16" in refusal(forged)
    edit_torch(path, forged, b"K\x04\x85", b"M\x00\x20\x85")  # the tensor's shape
    assert "reaches to value 8,192 of 4" in refusal(forged)
    edit_torch(path, forged, b"K\x04\x85", b"J\xff\xff\xff\xff\x85")
    assert "whole numbers" in refusal(forged)
    edit_torch(path, forged, b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009")  # the storage's name
    assert "are absent" in refusal(forged)
    edit_torch(path, forged, b"K\x04tq", b"K\x04tq")
    assert_same(read_tensors(forged).tensors, {"w": torch.arange(4.0)})


def test_a_legacy_file_that_claims_more_than_it_has(tmp_path):
    path = tmp_path / "x"
    legacy({"w": torch.arange(4.0)}, path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"K\x04N", b"M\x00\x20N"))
    assert "its tensors need" in refusal(path)
    path.write_bytes(content[:-24] + struct.pack("<q", 8) + content[-16:])
    assert "cannot be read as weights" in refusal(path)
    path.write_bytes(content + b"more")
    assert "its tensors need" in refusal(path)


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
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.comment = b"hello"
    assert "comment" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("w.npy", b"")
        archive.writestr("w.npy", b"")
    assert "two members of the same name" in refusal(path)


@formats
def test_the_bound_is_the_tensors_length(tmp_path, write):
    write({"a": torch.ones(1000), "b": torch.ones(10, dtype=torch.float64)}, tmp_path / "x")
    assert "unpack" in refusal(tmp_path / "x", max_bytes=4079)
    assert len(read_tensors(tmp_path / "x", max_bytes=4080).tensors) == 2


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
PAIRS = b"](" + b"](K\0K\0e" * 20_000 + b"eq\x00ccollections\nOrderedDict\nq\x01"
BOMBS = {
    "npz of zeros": (lambda path: npz_bomb(path, 2**26, 2**28), "unpacks to 268,435,456 bytes"),
    "npz that claims terabytes": (lambda path: npz_bomb(path, 2**40, 2**20, 2**42), "unpacks to 4,398,046,511,104"),
    "npz that claims too little": (lambda path: npz_bomb(path, 1000, 2**28, 4000), "Bad CRC"),
    "many members": (lambda path: crowded_zip(path, False), "table of contents takes 4,590,000 bytes"),
    "many members, large": (lambda path: crowded_zip(path, True), "table of contents takes 4,590,000 bytes"),
    "torch's storage": (torch_bomb, "should be 40,000,000,000,000 bytes long and are 16"),
    "the older storage": (legacy_bomb, "its tensors need 40,000,"),
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
        "'w' has no data",
    ),
    "lists that double": (instructions(b"]q\x00", b"](h\x00h\x00eq\x00" * 60, b"}U\x01wh\x00s"), "has list 'w'"),
    "a name that doubles": (
        instructions(b")q\x00", b"h\x00h\x00\x86q\x00" * 60, b"}h\x00K\x01s"),
        "neither text nor a whole number",
    ),
    "text that doubles": (
        instructions(b"U\x01wq\x00", b"c_codecs\nencode\nh\x00U\x09hex_codec\x86Rq\x00" * 60),
        "another code than latin1",
    ),
    "one array under many names": (instructions(LENT), "unpacks to 4,194,304,000 bytes"),
    "one list for many dicts": (instructions(PAIRS, b"h\x01h\x00\x85R" * 1000), "1,000,000 operations"),
    "many dicts": (instructions(b"}" * 3_000_000), "1,000,000 operations"),
    "a place far away": (instructions(b"}r\xff\xff\xff\xff"), "holds no tensors"),
    "long bytes": (instructions(b"\x8e", (2**62).to_bytes(8, "little"), b"x"), "damaged"),
    "long text": (instructions(b"\x8d", (2**40).to_bytes(8, "little"), b"x"), "damaged"),
    "a long number": (instructions(b"\x8b", (2**31 - 1).to_bytes(4, "little"), b"x"), "damaged"),
    "a long string": (instructions(b"T", (2**31 - 1).to_bytes(4, "little"), b"x"), "damaged"),
    "safetensors' header": (
        lambda path: safetensors_file(path, {"w": claim("F32", [4], 0, 16)}, length=10 * 10**9),
        "header claims 10,000,000,000 bytes",
    ),
    "safetensors' shape": (
        lambda path: safetensors_file(path, {"w": claim("F32", [10**12], 0, 4 * 10**12)}),
        "its tensors take 4,000,000,000,000 bytes",
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
