"""Output folders that another run uses, that are moved away, or whose checkpoints are damaged or of a longer run."""

import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.tools.interrupted.runs import assert_same, command

OTHERS = [[], ["--resume"], ["--eval-only"], ["--eval-only", "--resume"]]


@pytest.mark.parametrize("flags", OTHERS, ids=" ".join)
def test_a_second_run_beside_a_live_one(start, finish, whole, tmp_path, words, flags):
    """It is refused with one sentence, takes nothing away, and the first ends as if it had been alone."""
    folder = tmp_path / "run"
    first = start(folder, "hold_in_step", 7)
    first.wait_for("held")
    (folder / ".model_0000008.pth.abc.tmp").write_bytes(b"half")  # as in the middle of a checkpoint
    before = {file: file.read_bytes() for file in folder.iterdir()}
    second = [*words(folder, resume=False), *flags, "MODEL.WEIGHTS", str(folder / "model_0000002.pth")]
    status, printed = command(tmp_path / "second.txt", second).end()
    assert status == 2 and printed.count("\n") == 1, printed
    assert printed.startswith(f"error: OUTPUT_DIR {folder} is in use by process {first.pid} on "), printed
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    (folder / ".model_0000008.pth.abc.tmp").unlink()
    first.release()
    status, printed = first.end()
    assert status == 0, printed
    assert_same(folder, whole)


def test_two_processes_are_refused_together(start, tmp_path, words):
    folder = tmp_path / "run"
    first = start(folder, "hold_in_step", 7)
    first.wait_for("held")
    second = [*words(folder), "--num-gpus", "2", "SOLVER.CUDA_GRAPH", "False"]
    status, printed = command(tmp_path / "second.txt", second).end()
    assert status == 2 and printed.count("in use by process") == 1 and "Traceback" not in printed, printed
    assert sorted(file.name for file in folder.glob("log.txt*")) == ["log.txt"]
    first.send(signal.SIGKILL, to_all=True)
    first.end()


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made again"])
def test_a_folder_that_is_moved_away_ends_the_run(start, finish, whole, tmp_path, words, again):
    folder = tmp_path / "run"
    first = start(folder, "hold_in_step", 7)
    first.wait_for("held")
    folder.rename(tmp_path / "moved")
    if again:
        status, printed = command(tmp_path / "second.txt", words(folder)).end()
        assert status == 0, printed
    first.release()
    status, printed = first.end()
    assert status == 2 and "Traceback" not in printed, printed
    assert f"error: OUTPUT_DIR {folder} or its .lock was deleted, moved or replaced" in printed.splitlines()[-1]
    if again:
        assert_same(folder, whole)
    else:
        assert not folder.exists()
    assert "resumed: the next iteration is 6\n" in finish(tmp_path / "moved")
    assert_same(tmp_path / "moved", whole)


def test_a_shorter_run_does_not_take_a_longer_ones_checkpoint(start, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    final = (folder / "model_final.pth").read_bytes()
    status, printed = start(folder, keys="SOLVER.MAX_ITER 20").end()
    assert status == 2 and "SOLVER.MAX_ITER is 20 (command line), but the run to resume has done 24" in printed
    assert "Traceback" not in printed and (folder / "model_final.pth").read_bytes() == final
    assert start(folder).end()[0] == 0  # as long as it was: nothing to do
    assert_same(folder, whole)


@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "absent"])
def test_a_damaged_checkpoint_gives_way_to_an_earlier_one(start, finish, whole, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name in ("model_final.pth", "results.json"):
        (folder / name).unlink()
    last = folder / (folder / "last_checkpoint").read_text()
    content = bytearray(last.read_bytes())
    if damage == "cut":
        last.write_bytes(content[: len(content) * 2 // 3])
    elif damage == "altered":
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
    elif damage == "empty":
        last.write_bytes(b"")
    else:
        last.unlink()

    status, printed = start(folder).end()
    assert status == 2 and "Traceback" not in printed, printed
    sentence = printed.splitlines()[-1]
    assert sentence.startswith("error: cannot resume: ") and last.name in sentence
    advice = re.search(r"An earlier one is (\S+): write its name into (\S+) to go on from there\.$", sentence)
    assert advice, sentence
    Path(advice[2]).write_text(advice[1] + "\n")
    assert "resumed: the next iteration is 21\n" in finish(folder)
    # The damaged one was the last of the whole run: it was written anew.
    assert_same(folder, whole)
