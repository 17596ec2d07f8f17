import dataclasses
import errno
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from resnet_backbone.weights import Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from resnet_backbone.weights.checkpoint import FORMAT, VERSION


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes()) if tensor.dim() else tensor.numpy().tobytes()


def refusal(path) -> str:
    """The sentence with which reading `path` is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.fixture
def file(tmp_path, checkpoint):
    """A whole checkpoint file."""
    write_checkpoint(tmp_path / "model.pth", checkpoint)
    return tmp_path / "model.pth"


def test_round_trip_is_bit_exact(file, checkpoint):
    read = read_checkpoint(file)
    assert list(read.model) == list(checkpoint.model)
    for name, tensor in checkpoint.model.items():
        assert read.model[name].dtype == tensor.dtype and read.model[name].shape == tensor.shape
        assert bits(read.model[name]) == bits(tensor), name
    assert read.metadata == checkpoint.metadata
    assert read.iteration == 41
    assert read.trainer["seed"] == 7
    buffer = read.trainer["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(buffer, checkpoint.trainer["optimizer"]["state"][0]["momentum_buffer"])
    assert read.trainer["optimizer"]["param_groups"] == [{"lr": 0.1}]


def test_what_is_read_does_not_depend_on_the_file_any_more(file, checkpoint):
    read = read_checkpoint(file)
    file.write_bytes(bytes(100))
    buffer = read.trainer["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(buffer, checkpoint.model["weight"]) and torch.equal(read.model["weight"], buffer)


def test_the_memory_format_of_the_optimizers_state_stays(tmp_path, metadata):
    buffer = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    write_checkpoint(tmp_path / "x", Checkpoint({}, metadata(), 0, {"buffer": buffer}))
    assert read_checkpoint(tmp_path / "x").trainer["buffer"].stride() == buffer.stride()


def test_a_tensor_of_more_than_its_data(tmp_path, metadata):
    write_checkpoint(tmp_path / "x", Checkpoint({}, metadata(), 0, {"buffer": torch.zeros(1).expand(10**6, 10**6)}))
    assert "a tensor of 4,000,000,000,000 bytes has fewer in the file" in refusal(tmp_path / "x")


def test_a_file_for_use_has_no_training_state(tmp_path, checkpoint):
    write_checkpoint(tmp_path / "final.pth", Checkpoint(checkpoint.model, checkpoint.metadata))
    read = read_checkpoint(tmp_path / "final.pth")
    assert read.iteration is None and read.trainer is None
    assert set(torch.load(tmp_path / "final.pth", weights_only=True)) == {"format", "version", "model", "metadata"}


def test_parameters_are_written_without_their_graph(tmp_path, metadata):
    layer = nn.Linear(2, 2)
    write_checkpoint(tmp_path / "model.pth", Checkpoint(dict(layer.named_parameters()), metadata()))
    read = read_checkpoint(tmp_path / "model.pth").model
    assert not read["weight"].requires_grad and torch.equal(read["weight"], layer.weight)


def test_plain_torch_reads_it_without_executing_anything(file, checkpoint):
    payload = torch.load(file, weights_only=True)
    assert payload["metadata"]["architecture"] == "resnet50" and payload["metadata"]["crop"] == [64, 96]
    assert torch.equal(payload["model"]["weight"], checkpoint.model["weight"])


def test_detectron2s_checkpointer_loads_it(tmp_path, metadata):
    source, target = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    )
    source[1].running_mean.normal_()
    write_checkpoint(tmp_path / "model.pth", Checkpoint(source.state_dict(), metadata(), 3, {"seed": 0}))
    DetectionCheckpointer(target).load(str(tmp_path / "model.pth"))
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)


def test_numpy_in_the_metadata_can_be_read_back(tmp_path, checkpoint, metadata):
    changed = dataclasses.replace(checkpoint, metadata=metadata(origin={"AP": np.float64(12.5)}))
    write_checkpoint(tmp_path / "model.pth", changed)
    assert read_checkpoint(tmp_path / "model.pth").metadata.origin == {"AP": 12.5}


@pytest.mark.parametrize("share", [0.0005, 0.1, 0.5, 0.9, 0.999, 0.99999])
def test_a_truncated_file_says_so(file, share):
    content = file.read_bytes()
    length = min(int(len(content) * share), len(content) - 1)
    file.write_bytes(content[:length])
    message = refusal(file)
    assert f"cut off or damaged ({length:,} bytes" in message or "not a torch checkpoint" in message
    assert "earlier checkpoint" in message or length < 4


def test_no_flipped_byte_passes_unnoticed(file, checkpoint):
    """Every 37th byte, in headers, tensors and the table of contents: refused, or without any effect (padding)."""
    content = file.read_bytes()
    refused = 0
    for position in range(0, len(content), 37):
        file.write_bytes(content[:position] + bytes([content[position] ^ 0x5A]) + content[position + 1 :])
        try:
            read = read_checkpoint(file)
        except CheckpointError:
            refused += 1
            continue
        assert all(bits(read.model[name]) == bits(tensor) for name, tensor in checkpoint.model.items())
        assert read.metadata == checkpoint.metadata and read.iteration == 41
    assert refused > len(content) / 37 / 4


def test_a_flipped_byte_in_a_tensor_names_the_record(file, checkpoint):
    content = file.read_bytes()
    position = content.index(bits(checkpoint.model["weight"])) + 600
    file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    message = refusal(file)
    assert "altered" in message and "/data/" in message and "earlier checkpoint" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"<html>", "an HTML page"),
        (b"P", "not a torch checkpoint"),
        (b"\x93NUMPY\x01\x00", "not a torch checkpoint"),
        (b"PK\x03\x04 and then something else", "cut off or damaged"),
    ],
)
def test_foreign_files(tmp_path, content, words):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    assert words in refusal(path)


def test_a_pickle_is_not_executed(tmp_path):
    path, trace = tmp_path / "R-50.pkl", tmp_path / "executed"
    path.write_bytes(pickle.dumps({"model": Malicious(trace)}))
    assert "a pickle" in refusal(path)
    assert not trace.exists()


def test_a_torch_file_that_would_execute_code_is_not_executed(tmp_path):
    path, trace = tmp_path / "model.pth", tmp_path / "executed"
    torch.save({"format": FORMAT, "version": VERSION, "model": Malicious(trace)}, path)
    assert "nothing in it was executed" in refusal(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # it would have


def test_formats_that_are_not_supported(tmp_path):
    path = tmp_path / "resnet50-0676ba61.pth"
    torch.save({"conv1.weight": torch.zeros(2)}, path)
    assert "without this project's metadata" in refusal(path)
    torch.save(torch.zeros(2), path)
    assert "without this project's metadata" in refusal(path)
    torch.save({"conv1.weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    assert "a pickle" in refusal(path)
    np.savez(tmp_path / "mean.npz", mean=np.zeros(3))
    assert "cannot be read as weights" in refusal(tmp_path / "mean.npz")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "cannot be read as weights" in refusal(tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": VERSION + 1}, f"version {VERSION + 1}, this code reads version {VERSION}"),
        ({"version": None}, "version None"),
        ({"model": None}, "'model'"),
        ({"model": {"weight": 3}}, "'model'"),
        ({"metadata": None}, "metadata is NoneType"),
        ({"metadata": {"kind": "classifier"}}, "metadata lacks architecture"),
    ],
)
def test_altered_entries(file, changes, words):
    payload = torch.load(file, weights_only=True)
    torch.save({**payload, **changes}, file)
    assert words in refusal(file)
    for key in changes:
        torch.save({k: v for k, v in payload.items() if k != key}, file)
        refusal(file)


def test_a_missing_file_names_what_is_near(tmp_path, file):
    assert "its folder has model.pth" in refusal(tmp_path / "modle.pth")
    assert "it is a folder with model.pth" in refusal(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no .pth file" in refusal(tmp_path / "empty" / "model.pth")
    assert f"folder {tmp_path / 'absent'} does not exist" in refusal(tmp_path / "absent" / "model.pth")


def test_a_full_disk_keeps_the_old_file(file, checkpoint, monkeypatch):
    old = file.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*untouched.*--resume"):
            write_checkpoint(file, dataclasses.replace(checkpoint, iteration=42))
    assert file.read_bytes() == old
    assert os.listdir(file.parent) == [file.name]


def test_a_write_that_fails_in_the_middle_keeps_the_old_file(file):
    """A real failing write: the system refuses files above a size, as it does on a full disk."""
    old = file.read_bytes()
    script = """
import dataclasses, resource, sys, torch
from resnet_backbone.weights import read_checkpoint, write_checkpoint
checkpoint = read_checkpoint(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
write_checkpoint(sys.argv[1], dataclasses.replace(checkpoint, model={"big": torch.zeros(10**6)}))
"""
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "CheckpointError" in done.stderr.splitlines()[-1] and "File too large" in done.stderr.splitlines()[-1]
    assert file.read_bytes() == old
    assert os.listdir(file.parent) == [file.name]


def test_needs_no_detectron2():
    script = "import sys; sys.modules['detectron2'] = None; import resnet_backbone.weights"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_checkpoint_that_would_take_all_memory_is_refused_before_it_does(tmp_path, checkpoint, metadata):
    """torch.load makes the bytearray: it runs no code, but the file says how much memory it takes."""

    class Zeros:
        def __reduce__(self):
            return bytearray, (10**13,)

    payload = {"format": FORMAT, "version": VERSION, "model": checkpoint.model, "metadata": metadata().to_dict()}
    torch.save({**payload, "trainer": Zeros()}, tmp_path / "model.pth")
    assert "asks for '__builtin__.bytearray'" in refusal(tmp_path / "model.pth")
