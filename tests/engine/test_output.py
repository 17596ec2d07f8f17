import errno
import json
import logging
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg

from resnet_backbone.detection import add_network_config
from resnet_backbone.engine import lock, output
from resnet_backbone.engine.config import ConfigError, load_config
from resnet_backbone.weights import Checkpoint, CheckpointError, read_checkpoint
from tests.engine.tiny import metadata, refusal


def open_output(cfg, *, resume: bool = False, **named):
    """Open the folder as a run does, and let go of it."""
    with output.open_output(cfg, resume=resume, **named) as folder:
        return folder


def save(folder, iteration: int, **arguments):
    model = {"weight": torch.full((100,), float(iteration))}
    return output.save_training_checkpoint(
        folder, Checkpoint(model, metadata(iteration + 1), iteration, {"seed": 0}), **arguments
    )


class TestOpen:
    def test_makes_the_folder_and_starts_the_log(self, cfg):
        folder = open_output(cfg)
        assert sorted(os.listdir(folder)) == [".lock", "log.txt"]
        assert f"torch {torch.__version__}" in (folder / "log.txt").read_text()

    @pytest.mark.parametrize("held", ["last_checkpoint", "model_final.pth"])
    def test_a_run_in_it_needs_resume(self, cfg, held):
        folder = open_output(cfg)
        (folder / held).write_text("something")
        log = (folder / "log.txt").read_text()
        with pytest.raises(ConfigError, match=rf"{folder} already holds a run \({held}\).*--resume") as caught:
            open_output(cfg)
        assert "OUTPUT_DIR" in str(caught.value)
        assert (folder / held).read_text() == "something" and (folder / "log.txt").read_text() == log
        (folder / "last_checkpoint").write_text("something")
        assert open_output(cfg, resume=True) == folder

    @pytest.mark.parametrize("path", ["file", "file/folder"])
    def test_a_file_in_the_way(self, cfg, tmp_path, path):
        (tmp_path / "file").write_text("mine")
        cfg.OUTPUT_DIR = str(tmp_path / path)
        with pytest.raises(ConfigError, match=f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be written"):
            open_output(cfg)
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_folder_without_permission(self, cfg, monkeypatch):
        def refuse(**_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
        with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
            open_output(cfg)

    def test_a_full_disk(self, cfg, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**20, 2**20))
        with pytest.raises(ConfigError, match="has 1 MiB left"):
            open_output(cfg)


class TestWhatIsInTheFolder:
    """`--resume` needs a checkpoint's name or nothing to lose."""

    @pytest.fixture
    def folder(self, cfg):
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir()
        return folder

    def test_checkpoints_without_the_name_of_the_last(self, cfg, folder):
        for iteration in (3, 7):
            save(folder, iteration)
        (folder / "last_checkpoint").unlink()
        before = sorted(os.listdir(folder))
        message = refusal(open_output_resuming, cfg)
        assert f"{folder} holds model_0000007.pth, but no last_checkpoint" in message
        assert "write model_0000007.pth into that file" in message
        assert sorted(set(os.listdir(folder)) - {".lock"}) == before
        (folder / "last_checkpoint").write_text("model_0000007.pth\n")
        open_output(cfg, resume=True)

    def test_the_final_weights_alone(self, cfg, folder):
        (folder / "model_final.pth").write_bytes(b"weights")
        message = refusal(open_output_resuming, cfg)
        assert "holds model_final.pth, but no last_checkpoint" in message and "another OUTPUT_DIR" in message
        cfg.SOLVER.MAX_ITER = 0  # writes nothing to resume from
        open_output(cfg, resume=True)

    @pytest.mark.parametrize("name", [None, "model_best.pth", "log.txt", "model_mine.pth"])
    def test_nothing_to_lose(self, cfg, folder, name):
        """As a scheduler's second start after a first one that came to nothing, or to an evaluation."""
        if name:
            (folder / name).write_bytes(b"")
        open_output(cfg, resume=True)

    def test_one_checkpoint_that_a_kill_left_without_its_note(self, cfg, folder):
        save(folder, 3)
        (folder / "last_checkpoint").unlink()
        open_output(cfg, resume=True)
        assert output.read_last_checkpoint(folder).iteration == 3

    @pytest.mark.parametrize("name", ["results.json", "config.yaml", "metrics.json", "model_final.pth", "log.txt"])
    def test_a_folder_in_a_files_place(self, cfg, folder, name):
        (folder / name).mkdir()
        assert f"{folder / name} is a folder" in refusal(open_output, cfg)

    def test_a_file_in_a_folders_place(self, cfg, folder):
        (folder / "inference").write_text("")
        assert f"{folder / 'inference'} is a file" in refusal(open_output, cfg)

    @pytest.mark.parametrize("name", ["results.json", "inference", "inference/coco_2014_val/results.json"])
    def test_what_another_user_wrote(self, cfg, folder, name, monkeypatch):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name == "inference" else path.write_text("")
        # Root may write everywhere.
        monkeypatch.setattr(os, "access", lambda entry, mode: Path(entry) != path or mode != os.W_OK)
        assert refusal(open_output, cfg).startswith(f"{path} is not writable. Move it away")

    def test_a_loop_of_links(self, cfg, tmp_path):
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        for path in (tmp_path / "loop", tmp_path / "loop" / "run"):
            cfg.OUTPUT_DIR = str(path)
            assert f"OUTPUT_DIR {path} cannot be written" in refusal(open_output, cfg)


def open_output_resuming(cfg) -> None:
    open_output(cfg, resume=True)


def test_logs_of_two_runs_in_one_process_do_not_mix(cfg, tmp_path, capsys):
    for name in ("first", "second"):
        cfg.OUTPUT_DIR = str(tmp_path / name)
        open_output(cfg)
        for logger in ("resnet_backbone.x", "detectron2.y", "fvcore.z"):
            logging.getLogger(logger).info("%s of %s", logger, name)
    for name, other in (("first", "second"), ("second", "first")):
        text = (tmp_path / name / "log.txt").read_text()
        for logger in ("resnet_backbone.x", "detectron2.y", "fvcore.z"):
            assert text.count(f"{logger} of {name}") == 1
        assert f"of {other}" not in text
    assert capsys.readouterr().out.count("resnet_backbone.x of second") == 1


def test_other_ranks_log_to_a_file_of_their_own(cfg, monkeypatch, capsys):
    monkeypatch.setattr(output.comm, "get_rank", lambda: 3)
    folder = open_output(cfg)
    assert os.listdir(folder) == ["log.txt.rank3"] and capsys.readouterr().out == ""


def test_the_written_config_loads_in_detectron2(cfg, tmp_path):
    add_network_config(cfg)
    overrides = ["SOLVER.BASE_LR", "0.00001", "DATASETS.TRAIN", "train-{00..07}.tar", "MODEL.NETWORK.WIDTH", "0.25"]
    load_config(cfg, "COCO-Detection/retinanet_R_50_FPN_1x.yaml", [*overrides, "INPUT.CROP.SIZE", "(64, 96)"])
    output.write_config(cfg, tmp_path)
    read = get_cfg()
    add_network_config(read)
    read.merge_from_file(str(tmp_path / "config.yaml"))
    assert yaml.safe_load(read.dump()) == yaml.safe_load(cfg.dump())
    assert read.SOLVER.BASE_LR == 1e-5 and read.DATASETS.TRAIN == ("train-{00..07}.tar",)
    assert read.INPUT.CROP.SIZE == [64, 96] and read.MODEL.NETWORK.WIDTH == 0.25
    assert os.listdir(tmp_path) == ["config.yaml"]


class TestLastCheckpoint:
    def test_the_last_one_is_found_again(self, tmp_path):
        assert output.read_last_checkpoint(tmp_path) is None
        for iteration in (3, 12):
            path = save(tmp_path, iteration)
        assert path.name == "model_0000012.pth"
        last = output.read_last_checkpoint(tmp_path)
        assert last.iteration == 12 and last.model["weight"][0] == 12 and last.metadata == metadata(13)
        assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000003.pth", "model_0000012.pth"]

    def test_the_note_follows_the_file(self, tmp_path, monkeypatch):
        """A run that is stopped between the two still resumes from the checkpoint before."""
        save(tmp_path, 3)

        def stop(path, *_):
            assert (tmp_path / "model_0000012.pth").exists()
            raise KeyboardInterrupt

        monkeypatch.setattr(output, "atomic_write", stop)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 12)
        assert output.read_last_checkpoint(tmp_path).iteration == 3

    def test_detectron2_finds_it_too(self, tmp_path):
        from detectron2.checkpoint import DetectionCheckpointer

        path = save(tmp_path, 3)
        checkpointer = DetectionCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
        assert checkpointer.has_checkpoint() and checkpointer.get_checkpoint_file() == str(path)

    @pytest.mark.parametrize("damage", ["missing", "cut"])
    def test_a_bad_one_names_an_earlier_one(self, tmp_path, damage):
        for iteration in (3, 7, 12):
            path = save(tmp_path, iteration)
        (tmp_path / "model_final.pth").write_bytes(b"")
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-50])
        with pytest.raises(CheckpointError) as caught:
            output.read_last_checkpoint(tmp_path)
        message = str(caught.value)
        assert message.startswith("cannot resume") and str(path) in message
        assert "An earlier one is model_0000007.pth" in message and str(tmp_path / "last_checkpoint") in message

    def test_a_later_one_is_not_called_earlier(self, tmp_path):
        for iteration in (3, 7, 12):
            save(tmp_path, iteration)
        (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
        (tmp_path / "model_0000007.pth").unlink()
        with pytest.raises(CheckpointError, match=r"An earlier one is model_0000003\.pth"):
            output.read_last_checkpoint(tmp_path)

    def test_without_an_earlier_one_none_is_named(self, tmp_path):
        save(tmp_path, 3).unlink()
        with pytest.raises(CheckpointError) as caught:
            output.read_last_checkpoint(tmp_path)
        assert "earlier one" not in str(caught.value)

    def test_a_note_of_rubbish(self, tmp_path):
        (tmp_path / "last_checkpoint").write_bytes(b"\xff\xfe\n")
        with pytest.raises(CheckpointError, match="cannot resume"):
            output.read_last_checkpoint(tmp_path)


class TestKeep:
    def names(self, folder) -> list[str]:
        return sorted(path.name for path in folder.glob("*.pth"))

    def test_the_newest_of_them(self, tmp_path):
        """By number, not by name: from ten million iterations on the names are longer."""
        for iteration in (3, 7, 9999999, 10000000):
            save(tmp_path, iteration, keep=2)
        assert self.names(tmp_path) == ["model_10000000.pth", "model_9999999.pth"]
        assert output.read_last_checkpoint(tmp_path).iteration == 10000000

    def test_none_is_removed_by_default(self, tmp_path):
        for iteration in range(4):
            save(tmp_path, iteration)
        assert len(self.names(tmp_path)) == 4

    def test_the_best_the_final_and_strangers_stay(self, tmp_path):
        strangers = ["model_0000001_mine.pth", "model_best.pth", "model_final.pth", "model_new.pth", "other.pth"]
        for name in strangers:
            (tmp_path / name).write_bytes(b"")
        for iteration in (3, 7, 12):
            save(tmp_path, iteration, keep=1)
        assert self.names(tmp_path) == sorted(["model_0000012.pth", *strangers])

    def test_the_one_that_is_named_stays_though_others_are_newer(self, tmp_path):
        """Who resumes from an earlier one writes its name into last_checkpoint."""
        for iteration in (3, 7, 12):
            save(tmp_path, iteration)
        (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
        save(tmp_path, 5, keep=1)
        assert output.read_last_checkpoint(tmp_path).iteration == 5

    def test_they_are_removed_when_the_new_one_is_named(self, tmp_path, monkeypatch):
        save(tmp_path, 3)

        def stop(path):
            raise KeyboardInterrupt

        monkeypatch.setattr(output, "atomic_write", stop)  # of last_checkpoint
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 7, keep=1)
        assert self.names(tmp_path) == ["model_0000003.pth", "model_0000007.pth"]
        assert output.read_last_checkpoint(tmp_path).iteration == 3


def test_the_best_is_for_use_not_for_resuming(tmp_path):
    save(tmp_path, 3)
    output.save_best_checkpoint(tmp_path, Checkpoint({"weight": torch.ones(2)}, metadata(0)))
    assert output.read_last_checkpoint(tmp_path).iteration == 3
    best = read_checkpoint(tmp_path / "model_best.pth")
    assert best.trainer is None and best.iteration is None and torch.equal(best.model["weight"], torch.ones(2))


class TestTornFiles:
    NAMES = (".model_0000007.pth.a1b2.tmp", ".last_checkpoint.xyz.tmp", ".metrics.json.q.tmp")

    @pytest.fixture
    def folder(self, cfg):
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir()
        save(folder, 3)
        for name in (*self.NAMES, "mine.tmp", ".mine"):
            (folder / name).write_bytes(b"half")
        return folder

    def test_what_a_killed_process_was_writing_is_removed(self, cfg, folder):
        open_output(cfg, resume=True)
        kept = {"model_0000003.pth", "last_checkpoint", "mine.tmp", ".mine"}
        assert set(os.listdir(folder)) == {*kept, ".lock", "log.txt"}

    def test_by_the_main_process_alone(self, cfg, folder, monkeypatch):
        monkeypatch.setattr(output.comm, "is_main_process", lambda: False)
        open_output(cfg, resume=True)
        assert {*self.NAMES} <= set(os.listdir(folder))

    def test_not_where_another_run_may_be_writing_them(self, cfg, folder, monkeypatch):
        """On a file system without locks nobody knows."""

        def no_locks(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
        open_output(cfg, resume=True)
        assert {*self.NAMES} <= set(os.listdir(folder))
        assert "has no locks" in (folder / "log.txt").read_text()

    def test_they_are_called_as_they_are_written(self, cfg, folder, monkeypatch):
        """The pattern is that of the function that writes."""
        seen = []
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda old, new: (seen.append(old), replace(old, new)))
        save(folder, 3)
        assert len(seen) == 2
        for path in seen:
            with open(path, "wb"):
                pass
        open_output(cfg, resume=True)
        assert not list(folder.glob(".*.tmp"))


def test_metrics_from_an_iteration_on_are_dropped(tmp_path):
    output.keep_metrics_before(tmp_path, 3)
    assert os.listdir(tmp_path) == []
    lines = [json.dumps({"iteration": i, "AP": float("nan")}) + "\n" for i in range(6)]
    path = tmp_path / "metrics.json"
    path.write_text("".join(lines) + '{"iteration": 2, "lo')
    output.keep_metrics_before(tmp_path, 6)
    assert path.read_text() == "".join(lines)
    output.keep_metrics_before(tmp_path, 3)
    assert path.read_text() == "".join(lines[:3])
    output.keep_metrics_before(tmp_path, 0)
    assert path.read_text() == ""
