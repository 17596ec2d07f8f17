import io
import os

import cv2
import numpy as np
import pytest
from PIL import Image

from resnet_backbone.data.check import KINDS, check
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.folders import FolderSource
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.report import in_both, in_both_text
from resnet_backbone.data.sources import open_source


def picture(seed: int, height: int = 40, width: int = 50) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def contents() -> dict[str, tuple[bytes, set[str]]]:
    """Files by name, each with what is to be found in it."""
    jpeg = encoded(picture(0, 400, 300))
    half = picture(5).convert("L").resize((50, 40))
    alpha = picture(6).copy()
    alpha.putalpha(half)
    sixteen = cv2.imencode(".png", np.random.default_rng(0).integers(0, 2**16, (20, 20, 3), np.uint16))[1].tobytes()
    frames = [picture(8), picture(9)]
    return {
        "a/good.jpg": (encoded(picture(1)), set()),
        "a/good.png": (encoded(picture(2), "PNG"), set()),
        "a/good.webp": (encoded(picture(3), "WEBP"), set()),
        "a/progressive.JPEG": (encoded(picture(4), progressive=True), set()),
        "a/empty.jpg": (b"", {"empty"}),
        "a/page.jpg": (b"<html>404 Not Found</html>", {"unreadable"}),
        "a/half.jpg": (jpeg[: len(jpeg) // 2], {"unreadable"}),
        "a/half.png": (encoded(picture(10), "PNG")[:-600], {"unreadable"}),
        "a/named.jpg": (encoded(picture(11), "PNG"), {"wrong_extension"}),
        "b/gray.jpg": (encoded(picture(12).convert("L")), {"grayscale"}),
        "b/bits.png": (encoded(picture(13).convert("1"), "PNG"), {"grayscale"}),
        "b/palette.png": (encoded(picture(14).convert("P"), "PNG"), {"palette"}),
        "b/clear.png": (encoded(picture(15).convert("P"), "PNG", transparency=3), {"palette", "transparent"}),
        "b/alpha.png": (encoded(alpha, "PNG"), {"transparent"}),
        "b/gray_alpha.png": (encoded(alpha.convert("LA"), "PNG"), {"grayscale", "transparent"}),
        "b/sixteen.png": (sixteen, {"sixteen_bit"}),
        "b/cmyk.jpg": (encoded(picture(16).convert("CMYK")), {"cmyk"}),
        "b/turned.jpg": (encoded(picture(17), exif=turned()), {"turned"}),
        "b/moving.webp": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), {"animated"}),
        "b/moving.png": (encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), {"animated"}),
        "b/telephone.jpg": (encoded(frames[1], "MPO", save_all=True, append_images=frames[:1]), set()),
        "b/tiny.png": (encoded(picture(18, 7, 30), "PNG"), {"tiny"}),
        "b/small.png": (encoded(picture(19, 8, 30), "PNG"), set()),
    }


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "set"
    for name, (data, _) in contents().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def findings(report) -> dict[str, set[str]]:
    """What was found in each image, by its path in the data set."""
    found = {}
    for kind in KINDS:
        for name in report.names(report.found(kind)):
            found.setdefault(os.path.relpath(name, report.source.root), set()).add(kind.name)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_each_kind_is_found(folder, workers):
    report = check(FolderSource(folder), entry="set", workers=workers)
    assert findings(report) == {name: kinds for name, (_, kinds) in contents().items() if kinds}
    assert report.stops == 4
    assert report.formats == {"JPEG": 5, "PNG": 11, "WEBP": 2, "MPO": 1}
    assert [os.path.basename(message).split(" is ")[0] for message in report.messages.values()] == [
        "empty.jpg", "half.jpg", "half.png", "page.jpg"
    ]  # fmt: skip


def test_damage_that_decoding_forgives(tmp_path, monkeypatch):
    """OpenCV may fill what is missing; Pillow's strict reading says so."""
    data = encoded(picture(0, 200, 300))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cut.jpg").write_bytes(data[: len(data) // 2])
    monkeypatch.setattr("resnet_backbone.data.inspection.decode", lambda data, what: np.zeros((200, 300, 3), np.uint8))
    report = check(FolderSource(tmp_path), entry="set")
    assert findings(report) == {"a/cut.jpg": {"damaged"}} and report.stops == 0
    assert "cut.jpg is damaged (image file is truncated" in report.text()


def test_the_summary_names_what_was_found(folder):
    (folder / "a" / "film.gif").write_bytes(b"GIF89a")
    (folder / "b" / "film.GIF").write_bytes(b"GIF89a")
    (folder / "b" / "deeper").mkdir()
    (folder / "b" / "deeper" / "README").write_text("words")
    (folder / "beside.jpg").write_bytes(b"")
    (folder / "b" / ".hidden").write_text("no matter")
    text = check(FolderSource(folder), entry="my set").text()
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "my set"
    assert lines[1] == "23 images, 2 classes with 9 (a) to 14 (b)"
    assert lines[2] == "shorter side 7 to 40 pixels, median 40; longer side 20 to 50 pixels, median 50"
    place = lines.index("3  unreadable")
    assert [line.split(" is ")[0] for line in lines[place + 1 : place + 4]] == [
        "a/half.jpg",
        "a/half.png",
        "a/page.jpg",
    ]
    assert lines[place + 3].endswith("(26 bytes that are no image of a known format); replace or remove it")
    assert lines[lines.index("2  files .gif: not taken for images, ignored") + 1] == "a/film.gif, b/film.GIF"
    assert lines[lines.index("1  files without an extension: not taken for images, ignored") + 1] == "b/deeper/README"
    assert lines[lines.index("1  files .jpg: not taken for images, ignored") + 1] == "beside.jpg"
    assert "hidden" not in text
    assert lines.index("Would stop a run") < lines.index("3  unreadable") < lines.index("Notes")
    assert lines.index("Notes") < lines.index("1  CMYK: converted to RGB")


def test_a_clean_shard(shards):
    report = check(open_source(shards[0]), entry="x")
    assert report.stops == 0 and not findings_of(report)
    text = report.text()
    assert "31 images, 4 classes with 7 (3) to 8 (0)" in text
    assert text.endswith("Would stop a run: nothing\n\n  Notes: none")
    heights = [8 + number % 5 for number in range(31)]
    assert report.as_dict()["sides"]["shorter"] == (8, int(np.median(np.minimum(heights, 9))), 9)


def findings_of(report) -> list[str]:
    return [kind.name for kind in KINDS if len(report.found(kind))]


def test_a_shard_with_faults(write_tar, tmp_path):
    members = {}
    for number, data in enumerate((b"", encoded(picture(0)), encoded(picture(1), "PNG"))):
        members[f"k{number}.jpg"], members[f"k{number}.cls"] = data, b"2"
    write_tar(tmp_path / "s.tar", members)
    report = check(open_source(tmp_path / "s.tar"), entry="s.tar")
    assert findings_of(report) == ["empty"] and report.stops == 1  # a record's extension says nothing, its key is kept
    assert report.names(report.found(KINDS[0])) == [f"{tmp_path}/s.tar:k0"]
    assert "3 classes with 0 (0) to 3 (2); 2 are empty" in report.text()


@pytest.fixture
def copies(tmp_path):
    """Two data sets. In the first, 0 = 3 in one class and 1 = 4 = 5 in two; its 2 and 0 are in the second, too."""
    files = [encoded(picture(seed)) for seed in range(4)]
    for name, which in (
        ("one/a/0", 0), ("one/a/1", 1), ("one/a/2", 2), ("one/a/3", 0), ("one/b/4", 1), ("one/b/5", 1),
        ("two/a/0", 3), ("two/a/1", 2), ("two/b/2", 0),
    ):  # fmt: skip
        path = tmp_path / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[which])
    for name in ("one/b/8.jpg", "one/b/9.jpg", "two/a/9.jpg"):
        (tmp_path / name).write_bytes(b"")  # which are equal, but no images
    return [check(FolderSource(tmp_path / name), entry=name) for name in ("one", "two")]


def test_copies(copies):
    report = copies[0]
    assert [group.tolist() for group in report.duplicates()] == [[0, 3], [1, 4, 5]]
    lines = [line.strip() for line in report.text().splitlines()]
    assert lines[lines.index("3  copies of others") + 1] == "a/0.jpg = a/3.jpg and 2 more"
    assert lines[lines.index("1  images with copies in more than one class") + 1] == "a/1.jpg = b/4.jpg"


def test_no_copies(shards, tmp_path, write_tar):
    assert check(open_source(shards[0]), entry="x").duplicates() == []
    write_tar(tmp_path / "empty.tar", {"k.jpg": b"", "k.cls": b"0"})
    assert check(open_source(tmp_path / "empty.tar"), entry="x").duplicates() == []


def test_images_in_both_sets(copies, shards):
    pairs = in_both(*copies)
    assert pairs == [(0, 3), (2, 1)]
    text = in_both_text(*copies, pairs)
    assert text.startswith("In both: 2, such as ") and text.endswith("two/b/2.jpg")
    other = check(open_source(shards[0]), entry="shards")
    assert (
        in_both_text(copies[0], other, in_both(copies[0], other))
        == "Of the images that were looked at, none is in both."
    )


def test_a_part(shards):
    report = check(open_source(shards[0]), entry="x", limit=4)
    assert report.checked.tolist() == [0, 7, 15, 23]
    assert "4 of them were looked at, spread evenly" in report.text()
    assert check(open_source(shards[0]), entry="x", limit=100).checked.tolist() == list(range(31))
    with pytest.raises(ValueError, match="limit is 0"):
        check(open_source(shards[0]), entry="x", limit=0)


def test_a_file_that_vanished(class_folders):
    source = FolderSource(class_folders)
    os.remove(source.describe(4))
    report = check(source, entry="x")
    assert report.found(KINDS[1]).tolist() == [4] and "cannot be read now" in report.text()


class Deadly(ClassificationSource):
    """Reading it ends the process, as a crashing decoder does."""

    def __init__(self) -> None:
        super().__init__(["a"], np.zeros(100, np.int64))

    def read(self, index: int) -> bytes:
        os._exit(1)

    def describe(self, index: int) -> str:
        return f"image {index}"


def test_a_process_that_dies_is_reported():
    with pytest.raises(DatasetError, match=r"a process that was looking at images died, 0 images .* \(at image 0\)"):
        check(Deadly(), entry="x", workers=1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(shards, capfd):
    """One line, and nothing of it at the end; none at all where nobody asked for it."""
    file = Terminal()
    check(open_source(shards[0]), entry="x", progress=file)
    text = file.getvalue()
    assert "0/31" in text and "image/s" in text and "\n" not in text
    assert text.endswith("\r") and not text.rstrip("\r").rpartition("\r")[2].strip()
    check(open_source(shards[0]), entry="x")
    assert capfd.readouterr().err == ""
