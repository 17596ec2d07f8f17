"""What importing the package costs and brings along."""

import subprocess
import sys

IMPORT = """
import sys, time
import torch
modules = set(sys.modules)
start = time.perf_counter()
import resnet_backbone
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
