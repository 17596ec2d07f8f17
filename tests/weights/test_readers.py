"""Honest files, written by the formats' own libraries, and damaged ones."""

import argparse
import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from resnet_backbone.weights import CheckpointError, write_checkpoint
from resnet_backbone.weights.checkpoint import Checkpoint
from resnet_backbone.weights.readers import read_tensors
from tests.weights.containers import (
    arrays,
    assert_same,
    bare_pickle,
    formats,
    legacy,
    npz,
    npz_compressed,
    python2,
    refusal,
    tensors,
)


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
    assert_same(read.tensors, net.state_dict())
    assert read.header == {"epoch": 3, "arch": "resnet50", "best": 76.1, "amp": False}


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
    for changed in (
        content.replace(b"(2, 3)", b"(2, 4)"),
        content.replace(b"(2, 3)", b"(-2,-3)").replace(b"  \n", b" \n"),
        content.replace(b"<f4", b"<f8"),
        content[:-4],
        content.replace(b"'shape'", b"'shade'"),
        b"\x93NUMPX" + content[6:],
        content.replace(b"NUMPY\x01", b"NUMPY\x02"),
        content[:40],
    ):
        assert "is cut off, damaged, or holds more than tensors" in refused(changed)
