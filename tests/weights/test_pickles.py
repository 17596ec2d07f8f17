import io
import pickle
import random

import numpy as np
import pytest

from resnet_backbone.weights.pickles import Array, Unreadable, check_pickle, read_arrays


def read(content: bytes):
    file = io.BytesIO(content)
    value = read_arrays(file)
    assert file.tell() == len(content)
    return value


def refusal(content: bytes) -> str:
    with pytest.raises(Unreadable) as caught:
        read_arrays(io.BytesIO(content))
    return str(caught.value)


def assert_same(found, expected) -> None:
    """Containers and values are equal to Python's own, arrays in type, shape and values."""
    if isinstance(found, Array):
        array = found.numpy()
        assert array.dtype == expected.dtype.newbyteorder("=") and array.shape == expected.shape
        assert np.array_equal(array, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected) and len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_same(one, other)
    else:
        assert found == expected


VALUES = [
    {"a": 1, "b": [1.5, None, True, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], 3: {"c": "Å\n'"}},
    {"small": 0, "byte": 255, "word": 65535, "minus": -1, "large": 2**31, "larger": 2**100},
    {str(i): "x" * i for i in range(300)},  # text of all lengths, more than 255 places in the memo
    {dtype: np.arange(6).astype(dtype).reshape(2, 3) for dtype in ("<f2", "<f4", ">f4", "f8", "i8", ">i8", "u1", "?")},
    {"fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "none": np.zeros((0, 3)), "single": np.array(2.5)},
    {"scalars": [np.float32(1.5), np.int64(7), np.bool_(True)]},
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", VALUES)
def test_reads_what_python_writes(value, protocol):
    content = pickle.dumps(value, protocol)
    assert_same(read(content), pickle.loads(content))


def test_one_array_at_two_places():
    array = np.ones(3)
    value = read(pickle.dumps([array, array], 2))
    assert value[0] is value[1]


def test_an_array_that_does_not_fit_its_data():
    content = pickle.dumps(np.arange(6.0).reshape(2, 3), 4)
    assert "an array of shape (2, 4) with 48 bytes" in refusal(content.replace(b"K\x02K\x03", b"K\x02K\x04"))
    assert "an array of shape (2, 3) with 48 bytes" in refusal(content.replace(b"\x8c\x02f8", b"\x8c\x02f4"))


def test_pickles_one_after_the_other():
    file = io.BytesIO(pickle.dumps(1, 2) + pickle.dumps([2], 2))
    for _ in range(2):
        check_pickle(file)
    assert file.read() == b""
    assert "a pickle with 9 bytes after its end" in refusal(file.getvalue())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_damage_ends_in_a_sentence(protocol):
    """Every cut, and many other bytes, some of which make another pickle that is as good."""
    content = pickle.dumps({"model": {"w": np.arange(5.0)}, "epoch": 3}, protocol)
    for length in range(len(content)):
        assert "cut off or damaged" in refusal(content[:length])
    generator = random.Random(0)
    refused = 0
    for _ in range(2000):
        changed = bytearray(content)
        changed[generator.randrange(len(content))] = generator.randrange(256)
        try:
            read_arrays(io.BytesIO(changed))
        except Unreadable:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize(
    ("instructions", "words"),
    [
        (b"cos\nsystem\n(S'true'\ntR", "'os.system'"),
        (b"(S'true'\nios\nsystem\n", "'os.system'"),
        (b"(ios\nsystem\n", "'os.system'"),
        (b"(cnumpy\nndarray\no", "damaged"),
        (b"cnumpy\nndarray\n)\x81", "damaged"),
        (b"\x82\x01", "damaged"),
        (b"U\x02osQ", "damaged"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93", "'os.system'"),
        (b"cnumpy.core.multiarray\nscalar\n}b", "a state for a function"),
        (b"cnumpy\nndarray\n(M\xff\xffM\xff\xfft\x85R", "damaged"),
    ],
)
def test_instructions_that_weights_do_not_need(instructions, words):
    assert words in refusal(b"\x80\x02" + instructions + b".")
