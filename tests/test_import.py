"""What importing the package costs and brings along."""

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

IMPORT = """
import sys, time
import torch
modules = set(sys.modules)
start = time.perf_counter()
import resnet_backbone
resnet_backbone.build_network
print(time.perf_counter() - start)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - modules}))
"""


def import_in_fresh_process() -> tuple[float, set[str]]:
    output = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout
    seconds, imported = output.splitlines()
    return float(seconds), set(imported.split())


def test_import_is_light():
    runs = [import_in_fresh_process() for _ in range(3)]
    imported = runs[0][1]
    assert "resnet_backbone" in imported
    heavy = {"detectron2", "fvcore", "torchvision", "numpy", "PIL", "cv2", "triton", "yacs", "safetensors"}
    assert not imported & heavy
    # The best of three: the first run may compile the modules, and another process may hold the core.
    assert min(seconds for seconds, _ in runs) < 0.05


def test_detection_brings_no_matplotlib():
    """Each script and each spawned process imports it, and few of them draw."""
    code = "import sys, resnet_backbone.detection; print('matplotlib' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "False"


def test_the_package_has_its_networks_and_nothing_else():
    import resnet_backbone
    from resnet_backbone import build_network, list_networks

    assert "resnet50" in list_networks() and build_network is resnet_backbone.build_network
    with pytest.raises(AttributeError, match="has no attribute 'build_netwrk'"):
        resnet_backbone.build_netwrk("resnet50")


@pytest.mark.parametrize("words", [["tools/train_net.py"], ["-m", "resnet_backbone.tools.pretrain"]])
def test_ctrl_c_during_the_imports_of_a_tool_prints_no_stack_trace(words):
    """By SIGINT's default action; a shell calls that exit code 130."""
    if words[0] == "-m" and importlib.util.find_spec("resnet_backbone.tools") is None:
        pytest.skip("the package is not installed")
    process = subprocess.Popen([sys.executable, "-v", *words, "--help"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    printed = ""
    while "import 'torch._C'" not in printed:  # in the middle of torch's import
        printed = process.stderr.readline() or pytest.fail("torch was not imported")
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in rest and "KeyboardInterrupt" not in rest
