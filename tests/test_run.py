"""python -m resnet_backbone.run, as a user calls it with a Detectron2 script that does not know this package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_backbone

from resnet_backbone import detection

# Everything that a script may look at is what `python script.py` gives it: the test runs it both ways.
LOOK = """
'''The script's own text.'''
import json, sys
names = sorted(name for name in globals() if not name.startswith("__"))
print(json.dumps([__name__, __doc__, __file__, sys.argv, sys.path[0], sys.modules["__main__"].__file__, names]))
import beside
raise ValueError("the script's own error")
"""

SPAWN = """
import json, sys
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

argv = list(sys.argv)  # also while a child imports this file

class Work:  # the children find it, as they find build, by its name in the main module
    seed = 3

def build(rank, work, out):
    cfg = get_cfg()
    if rank:
        from resnet_backbone.detection import add_network_config
        add_network_config(cfg)  # as in a script that has the two lines already
    cfg.merge_from_list(sys.argv[3:])
    torch.manual_seed(work.seed)
    features = build_backbone(cfg).eval()(torch.ones(1, 3, 32, 32))
    torch.save({"rank": rank, "main": __name__, "argv": argv, "res4": features["res4"]}, f"{out}/{rank}.pth")

if __name__ == "__main__":
    torch.multiprocessing.spawn(build, nprocs=2, args=(Work(), sys.argv[2]))
"""


def run(*words, cwd, module=("-m", "resnet_backbone.run"), **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *module, *map(str, words)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeed(*words, **named) -> str:
    done = run(*words, **named)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_script_sees_what_python_shows_it_and_fails_with_its_own_lines(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "look.py").write_text(LOOK)
    (tmp_path / "scripts" / "beside.py").write_text("")
    words = ("scripts/look.py", "--flag", "-h", "a b")
    ours, pythons = (run(*words, cwd=tmp_path, module=module) for module in (("-m", "resnet_backbone.run"), ()))
    assert json.loads(ours.stdout) == json.loads(pythons.stdout)
    assert json.loads(ours.stdout)[:2] == ["__main__", "The script's own text."]
    assert ours.returncode == pythons.returncode == 1
    end = pythons.stderr.splitlines()[-3:]  # the file and line, the line's text, the error
    assert "look.py" in end[0] and "line 7" in end[0] and end[1].strip().startswith("raise ValueError")
    assert ours.stderr.splitlines()[-3:] == end


def test_spawned_processes_have_the_keys_and_the_backbones(tmp_path):
    (tmp_path / "spawn.py").write_text(SPAWN)
    keys = ["MODEL.BACKBONE.NAME", "build_network_backbone", "MODEL.NETWORK.NAME", "resnet18", "MODEL.DEVICE", "cpu"]
    keys += ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"]
    succeed("spawn.py", "--out", tmp_path, *keys, cwd=tmp_path)
    cfg = detection.get_config()
    cfg.merge_from_list(keys)
    torch.manual_seed(3)
    expected = build_backbone(cfg).eval()(torch.ones(1, 3, 32, 32))["res4"]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pth")
        assert found["main"] == "__mp_main__" and found["argv"] == ["spawn.py", "--out", str(tmp_path), *keys]
        torch.testing.assert_close(found["res4"], expected)


@pytest.fixture
def detector(detection_config, classifier, tmp_path) -> Path:
    """The folder that a run left: config.yaml, model_final.pth, and what its evaluation found."""
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", classifier("resnet18"))
    detection.run(
        detection_config("faster_rcnn_R50.yaml", tmp_path / "run", *keys, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    )
    return tmp_path / "run"


def test_detectron2s_train_net_evaluates_and_trains_our_detector(detector, scenes, tmp_path):
    shutil.copy(Path(__file__).with_name("stock_train_net.py"), tmp_path / "train_net.py")
    words = ("train_net.py", "--config-file", detector / "config.yaml")
    keys = ("DATASETS.TRAIN", "('scenes',)", "DATASETS.TEST", "('scenes',)", "OUTPUT_DIR")
    weights = ("MODEL.WEIGHTS", detector / "model_final.pth")
    succeed(*words, "--eval-only", *keys, tmp_path / "test", *weights, cwd=tmp_path, SCENES=scenes)
    ours, theirs = (
        json.loads(next(folder.rglob("coco_instances_results.json")).read_text())
        for folder in (detector, tmp_path / "test")
    )
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs):
        assert one["image_id"] == other["image_id"] and one["category_id"] == other["category_id"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-2)
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)

    schedule = ("SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 2)  # ours takes 0, Detectron2's trainer does not
    succeed(*words, *keys, tmp_path / "train", *schedule, cwd=tmp_path, SCENES=scenes)
    trained = torch.load(tmp_path / "train" / "model_final.pth")
    assert trained["iteration"] == 1
    before = torch.load(detector / "model_final.pth", weights_only=False)["model"]
    assert set(trained["model"]) == set(before)


@pytest.mark.parametrize(
    ("script", "hint"), [("trian_net.py", "the nearest is train_net.py."), ("no/net.py", "no has no .py file.")]
)
def test_a_missing_script_ends_in_one_sentence(tmp_path, script, hint):
    (tmp_path / "train_net.py").write_text("")
    done = run(script, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"error: there is no script {script}; {hint}\n")
