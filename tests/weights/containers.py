"""Files of weights in every container that is read, and the refusal of a bad one."""

import pickle
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

from resnet_backbone.weights import CheckpointError
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
