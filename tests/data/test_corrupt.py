import logging

import pytest

from resnet_backbone.data.corrupt import CorruptCounter, first_readable
from resnet_backbone.data.errors import DatasetError


def test_counter_names_each_image_once(caplog):
    count = CorruptCounter(0.1)
    with caplog.at_level(logging.WARNING, logger="resnet_backbone"):
        for batch in ((8, []), (8, ["a is empty", "b is empty"]), (8, ["a is empty", "c is empty"])):
            count(*batch)
    assert (count.images, count.replaced) == (24, 4)
    assert [record.getMessage() for record in caplog.records] == [
        "a is empty. Another image replaced it; 1 so far",
        "b is empty. Another image replaced it; 2 so far",
        "c is empty. Another image replaced it; 3 so far",
    ]


def test_counter_stops_above_the_limit():
    count = CorruptCounter(0.01)
    for _ in range(20):  # 20 of 2000 is the limit, not more
        count(100, ["a is empty"])
    count(99, [])
    with pytest.raises(DatasetError) as caught:
        count(1, ["b is empty", "c is empty"])
    message = str(caught.value)
    assert message.startswith("22 of the 2100 images loaded so far could not be read and were replaced (1.05%, 3 ")
    assert all(words in message for words in ("the limit is 1%", "c is empty", "check_dataset.py", "MAX_CORRUPT"))


def test_the_first_few_do_not_stop_a_run():
    count = CorruptCounter(0.001)
    for _ in range(10):
        count(8, ["a is empty"])
    with pytest.raises(DatasetError, match="11 of the 88 images"):
        count(8, ["a is empty"])
    with pytest.raises(DatasetError, match="1 of the 8 images"):
        CorruptCounter(0.0)(8, ["a is empty"])
    CorruptCounter(0.0)(8, [])
    with pytest.raises(ValueError, match=r"the limit of unreadable images is 1\.5; expected a share"):
        CorruptCounter(1.5)


def test_the_replacement_is_a_function_of_seed_position_and_failures():
    def load(index):
        if index % 3:
            raise DatasetError(f"image {index} is empty")
        return index

    def draw(seed, position):
        return first_readable(load, 1, size=1000, seed=seed, position=position)

    assert first_readable(load, 3, size=1000, seed=0, position=0) == (3, [])
    found = [draw(0, position) for position in range(50)]
    assert found == [draw(0, position) for position in range(50)] != [draw(1, position) for position in range(50)]
    assert len({index for index, _ in found}) > 30 and all(index % 3 == 0 for index, _ in found)
    assert all(words[0] == "image 1 is empty" for _, words in found) and max(len(words) for _, words in found) > 3


def test_many_failures_in_a_row_blame_the_data_set():
    def load(index):
        raise DatasetError(f"image {index} is empty")

    with pytest.raises(DatasetError, match=r"20 images in a row, .* The last one: image \d+ is empty"):
        first_readable(load, 0, size=9, seed=0, position=0)
