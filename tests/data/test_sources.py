import multiprocessing
import os
import pickle
import tarfile

import numpy as np
import pytest

from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.interface import PackedStrings
from resnet_backbone.data.sources import open_source, register_source


def test_folder(class_folders):
    source = open_source(class_folders)
    assert source.class_names == ["ant", "bee", "cat"]
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    expected = sorted(path for path in class_folders.rglob("*.PNG"))
    assert [source.describe(index) for index in range(len(source))] == [str(path) for path in expected]
    assert [source.read(index) for index in range(len(source))] == [path.read_bytes() for path in expected]


def test_folder_agrees_with_torchvision(class_folders):
    folder = pytest.importorskip("torchvision.datasets").ImageFolder(class_folders)
    source = open_source(class_folders)
    assert source.class_names == folder.classes
    # torchvision lists a folder's own images before those further down.
    assert sorted((source.describe(i), int(source.labels[i])) for i in range(len(source))) == sorted(folder.samples)


def test_hidden_and_other_files_are_ignored(class_folders):
    (class_folders / ".ipynb_checkpoints").mkdir()
    (class_folders / "ant" / "._0.PNG").write_bytes(b"resource fork")
    (class_folders / "ant" / "notes.txt").write_text("no image")
    source = open_source(class_folders)
    assert len(source) == 9 and len(source.class_names) == 3


def test_registered_names(class_folders, tmp_path, monkeypatch):
    for split in ("train", "val"):
        (tmp_path / "root" / "imagenet" / split).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(class_folders, tmp_path / "root" / "imagenet" / split)
    assert len(open_source("imagenet_train", root=tmp_path / "root")) == 9
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "root"))
    assert open_source("imagenet_val").read(0) == open_source(class_folders).read(0)
    monkeypatch.delenv("DETECTRON2_DATASETS")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    os.symlink(tmp_path / "root", "datasets")
    assert len(open_source("imagenet_train")) == 9
    register_source("for_this_test", lambda root: open_source(root / "x"))
    os.symlink(class_folders, tmp_path / "x")
    assert len(open_source("for_this_test", root=tmp_path)) == 9


def test_shards_read_what_tarfile_extracts(shards):
    pattern, images, labels = shards
    source = open_source(pattern)
    assert source.labels.dtype == np.int64 and source.labels.tolist() == labels
    assert source.class_names == ["0", "1", "2", "3"]
    for index in np.random.default_rng(0).permutation(len(source)):
        assert source.read(index) == images[index]
        shard, key = source.describe(index).rsplit(":", 1)
        with tarfile.open(shard) as archive:
            assert archive.extractfile(f"{key}.png").read() == images[index]


def test_real_shards(tiny_imagenet):
    source = open_source(tiny_imagenet / "val-000000.tar")
    assert len(source) == 3000 and len(source.class_names) == 200
    assert source.class_names[0] == "goldfish, Carassius auratus"
    assert (np.bincount(source.labels) == 15).all()
    with tarfile.open(tiny_imagenet / "val-000000.tar") as archive:
        for index in range(0, 3000, 157):
            key = source.describe(index).rsplit(":", 1)[1]
            assert source.read(index) == archive.extractfile(f"{key}.jpg").read()
            assert source.labels[index] == int(archive.extractfile(f"{key}.cls").read())


def test_class_names_of_shards(write_tar, tmp_path):
    write_tar(tmp_path / "a.tar", {"x.jpg": b"1", "x.cls": b"2\n"})
    (tmp_path / "classes.txt").write_text("n1\tcrane\nn2\tdog, hound\nn3\tcrane\n")
    assert open_source(tmp_path / "a.tar").class_names == ["crane (n1)", "dog, hound", "crane (n3)"]
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    assert open_source(tmp_path / "a.tar").class_names == ["red", "green", "blue"]


def test_long_names_and_folders_in_shards(write_tar, tmp_path):
    """Names beyond the header's 100 bytes, and member names that share a base name in different folders."""
    keys = ["a/" + "long" * 60, "a/x", "b/x", "b/x.y"]
    write_tar(
        tmp_path / "a.tar",
        {f"{key}{end}": key.encode() if end == ".JPEG" else b"0" for key in keys for end in (".JPEG", ".cls")},
    )
    source = open_source(tmp_path / "a.tar")
    assert [source.read(index).decode() for index in range(4)] == keys
    assert [source.describe(index).split(".tar:")[1] for index in range(4)] == keys


def _read_all(source, queue):
    queue.put([source.read(index) for index in range(len(source))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_shards_in_other_processes(shards, method):
    pattern, images, _ = shards
    source = open_source(pattern)
    source.read(0)  # opened here before the workers start
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_read_all, args=(source, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert results == [images, images]
    assert source.read(5) == images[5]


def test_open_files_are_limited_and_closed(write_tar, tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_backbone.data.shards._OPEN_FILES", 3)
    for number in range(9):
        write_tar(tmp_path / f"s-{number}.tar", {"x.jpg": b"%d" % number, "x.cls": b"0"})
    before = len(os.listdir("/proc/self/fd"))
    source = open_source(f"{tmp_path}/s-{{0..8}}.tar")
    for index in (0, 8, 3, 4, 5, 0, 8):
        assert source.read(index) == b"%d" % index
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(7) == b"7"
    del source, copy
    assert len(os.listdir("/proc/self/fd")) == before


def test_several_ranges(write_tar, tmp_path):
    for name in ("a-08", "a-09", "a-10", "b-08", "b-09", "b-10"):
        write_tar(tmp_path / f"{name.replace('a', '1').replace('b', '2')}.tar", {"x.jpg": name.encode(), "x.cls": b"0"})
    source = open_source(f"{tmp_path}/{{1..2}}-{{08..10}}.tar")
    assert [source.read(i) for i in range(6)] == [b"a-08", b"a-09", b"a-10", b"b-08", b"b-09", b"b-10"]


def test_packed_strings():
    strings = ["", "a", "", "Zürich/é.jpg", "long" * 100, "bad\udcff"]
    packed = PackedStrings(strings)
    assert len(packed) == 6 and [packed[index] for index in range(6)] == strings
    assert len(PackedStrings([])) == 0


# What bad input gets: one sentence each that says what was found, what was expected and what to do.


def fails(entry, *parts):
    with pytest.raises(DatasetError) as caught:
        open_source(entry)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_wrong_paths(class_folders, shards, tmp_path):
    fails(
        tmp_path / "no" / "such" / "place",
        "does not exist",
        f"the nearest that exists is {tmp_path}",
        "one folder of images per class",
    )
    fails(tmp_path / "folder", f"{tmp_path} exists, with 3 tar shards", "nearest name is 'folders'")
    fails(class_folders / "ant" / "0.PNG", "is a file", "one folder of images per class")
    fails(tmp_path / "train-{00..04}.tar", "2 of 5 shards are missing", "train-03.tar, ", "train-04.tar", "3 exist")
    fails(tmp_path / "val-{00..04}.tar", "names 5 shards, of which none exists", "3 tar shards")
    fails(tmp_path / "val.tar", "val.tar does not exist", "3 tar shards")
    fails(tmp_path / "train-{02..00}.tar", "counts down from 02 to 00")
    fails(tmp_path / "train-{a,b}.tar", "braces without a range of numbers")
    fails("imagenet_trian", "no registered name", "'imagenet_train' is the nearest")


def test_registered_name_without_its_folder(tmp_path):
    with pytest.raises(DatasetError, match=r"imagenet_train: .*imagenet/train does not exist .*DETECTRON2_DATASETS"):
        open_source("imagenet_train", root=tmp_path)


def test_empty_and_misplaced_folders(class_folders, tmp_path):
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no class folders", "with nothing in it", "CLASS/IMAGE")
    (tmp_path / "shallow").mkdir()
    (tmp_path / "shallow" / "a.jpg").write_bytes(b"")
    fails(tmp_path / "shallow", "1 images directly in it", "CLASS/IMAGE")
    (tmp_path / "bare" / "one").mkdir(parents=True)
    fails(tmp_path / "bare", "1 folders (one) but no image in them")
    for name in "dfghijk":
        (class_folders / name).mkdir()
    fails(class_folders, "7 of 10 class folders hold no image: d, f, g, h, i and 2 more", "add images", "remove")


def test_bad_shards(shards, write_tar, tmp_path):
    path = tmp_path / "bad.tar"

    def check(members, *parts):
        write_tar(path, members)
        fails(path, f"{path}", *parts)

    check({"note.txt": b"x"}, "holds no record", "KEY.cls")
    check({"a.jpg": b"x", "b.jpg": b"x", "b.cls": b"0"}, "bad.tar:a has an image but no a.cls", "remove")
    check({"a.gif": b"x", "a.cls": b"0"}, "bad.tar:a has a .cls but no image", "a.jpg or a.jpeg or a.png")
    check({"a.jpg": b"x", "a.png": b"x", "a.cls": b"0"}, "bad.tar:a holds two images")
    check({"a.jpg": b"x", "a.cls": b"cat"}, "a.cls holds 'cat'", "number of a class")
    check({"a.jpg": b"x", "a.cls": b"1" * 31}, "a.cls holds '1111", "number of a class")
    check({"a.jpg": b"x", "a.cls": b"0", "a.CLS": b"1"}, "bad.tar:a has two classes")
    check({"a.jpg": b"x", "a.cls": b"-1"}, "bad.tar:a has the class -1", "begin at 0")
    (tmp_path / "classes.txt").write_text("red\ngreen\n")
    check({"a.jpg": b"x", "a.cls": b"2"}, "bad.tar:a has the class 2", "classes.txt names the classes 0...1", "correct")
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(DatasetError, match=r"classes\.txt is empty; expected one line per class"):
        open_source(path)


def test_broken_archives(shards, tmp_path):
    whole = (tmp_path / "train-00.tar").read_bytes()
    path = tmp_path / "bad.tar"
    path.write_bytes(b"")
    fails(path, "no complete tar archive", "copy or write it again")
    path.write_bytes(b"hello" * 1000)
    fails(path, "no complete tar archive")
    path.write_bytes(whole[:2000])
    fails(path, "bad.tar")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "train-00.tar", "x.jpg")
    fails(path, "is compressed", "unpack it to a plain .tar")


def test_changed_after_opening(shards, class_folders, tmp_path):
    source = open_source(tmp_path / "train-00.tar")
    os.truncate(tmp_path / "train-00.tar", 600)
    with pytest.raises(DatasetError, match=r"train-00\.tar:key00 has 88 of its .* changed after it was opened"):
        source.read(0)
    folder = open_source(class_folders)
    (class_folders / "ant" / "0.PNG").unlink()
    with pytest.raises(DatasetError, match=r"0\.PNG was found at the start but cannot be read now"):
        folder.read(0)
