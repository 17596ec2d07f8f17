"""Finding the records of a shard; what a source does with them is in test_sources.py."""

import io
import tarfile

import numpy as np
import pytest

from resnet_backbone.data import shards
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.shards import ShardSource

LONG = "folder/" * 20 + "key"


def write(path, form, *, long: bool, link: bool) -> dict[str, bytes]:
    """A shard of 40 records among folders and other files; gives the images by key."""
    rng, images = np.random.default_rng(0), {}
    with tarfile.open(path, "w", format=form) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number in range(40):
            key = LONG if long and number == 7 else f"folder/ü{number}.x"
            images[key] = rng.bytes(int(rng.choice([0, 1, 511, 512, 513, 3000])))
            for name, data in ((f"{key}.jpg", images[key]), (f"{key}.cls", b"1"), (f"{key}.json", b"{}")):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(data), 1.7e9 + number
                archive.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo("folder/link.jpg")
            info.type, info.linkname = tarfile.SYMTYPE, "ü0.x.jpg"
            archive.addfile(info)
    return images


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("long, link", [(False, False), (True, False), (False, True)])
def test_every_form_of_tar(tmp_path, form, long, link):
    images = write(tmp_path / "s.tar", form, long=long, link=link)
    source = ShardSource(str(tmp_path / "s.tar"))
    assert [source.describe(index) for index in range(len(source))] == [f"{tmp_path}/s.tar:{key}" for key in images]
    assert [source.read(index) for index in range(len(source))] == list(images.values())


@pytest.mark.parametrize("damage", ["in data", "between members", "in a header", "flipped bit", "zeros", "two shards"])
def test_a_damaged_shard_is_refused(tmp_path, damage):
    write(tmp_path / "s.tar", tarfile.GNU_FORMAT, long=False, link=False)
    data = bytearray((tmp_path / "s.tar").read_bytes())
    with tarfile.open(tmp_path / "s.tar") as archive:
        members = archive.getmembers()
    header = members[len(members) // 2].offset
    largest = max(members, key=lambda member: member.size)
    if damage == "flipped bit":
        data[header] ^= 1
    elif damage == "zeros":
        data[header : header + 512] = bytes(512)
    elif damage == "two shards":
        data = data * 2
    else:
        cut = {"in data": largest.offset_data + 100, "between members": header, "in a header": header + 100}
        data = data[: cut[damage]]
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(DatasetError, match="is no complete tar archive"):
        ShardSource(str(tmp_path / "s.tar"))


@pytest.mark.parametrize("zeros", [1024, 10240, 3 * 2**20])
def test_zeros_after_the_end_are_padding(tmp_path, zeros):
    images = write(tmp_path / "s.tar", tarfile.GNU_FORMAT, long=False, link=False)
    with tarfile.open(tmp_path / "s.tar") as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    data = (tmp_path / "s.tar").read_bytes()[:end]
    (tmp_path / "s.tar").write_bytes(data + bytes(zeros))
    assert len(ShardSource(str(tmp_path / "s.tar"))) == len(images)


def test_the_interpreters_end_says_nothing(tmp_path, monkeypatch):
    write(tmp_path / "s.tar", tarfile.GNU_FORMAT, long=False, link=False)
    source = ShardSource(str(tmp_path / "s.tar"))
    source.read(0)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "os", None)  # as names in modules are then
        source.__del__()
    source.close()
