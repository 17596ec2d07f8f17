#!/usr/bin/env python3
"""Install Detectron2 0.6 into the Python environment that runs this script.

    python tools/install_detectron2.py [--sdist FILE]    # in a clone
    resnet-backbone-install-detectron2 [--sdist FILE]    # where pip installed this package

Detectron2 is not published under its own name on the package index, and release 0.6 does not import with today's
NumPy, Pillow, setuptools and torch. This script

1. leaves an importable Detectron2 alone, so your own build with compiled operators stays in use;
2. fetches the sdist ``pb1-detectron2==0.6``, which has the 0.6 release's Python files, and checks its SHA-256;
3. patches the lines that no longer work (see `PATCHES` for each and its reason; a missing line stops the script);
4. builds a pure-Python wheel named ``detectron2`` and installs it with pip, so that ``pip list``, ``pip check`` and
   ``pip uninstall detectron2`` work.

The wheel has no compiled operators. RoIAlign, NMS and deformable convolution come from torchvision; rotated boxes and
Detectron2's own ``COCOeval_opt`` are unavailable and say so. The script uses only the standard library; install torch,
setuptools and wheel first, because pip runs the sdist's setup.py for its metadata.
"""

import argparse
import base64
import hashlib
import importlib.util
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

SDIST = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
# Fetch the sdist with this pip: 26.3 rejects its metadata because the optional extra "all" names a URL.
PIP = "pip==25.3"
PIP_SHA256 = "9655943313a94722b7774661c21049070f6bbb0a1516bf02f7c8d5d9201514cd"
VERSION = "0.6"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
PATCHES_FILE = "MENDS.txt"  # do not rename: it identifies wheels built earlier

# As in Detectron2's setup.py, minus what only caffe2 used (future, pydot), the formatter only LazyConfig.to_py calls
# (black==21.4b2) and iopath's upper bound (0.1.10 was tested). As upstream, torch, torchvision and OpenCV are not
# required: users choose their own builds.
REQUIRES = (
    "numpy",
    "PyYAML",
    "packaging",
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
)

# Installed under detectron2.projects, as in Detectron2's setup.py. Its top-level package `tools` is omitted: the name
# is too generic to claim in site-packages.
PROJECTS = {
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}


class Patch(NamedTuple):
    """Replace `old` with `new` in `file`, where `old` must occur exactly `count` times."""

    file: str
    old: str
    new: str
    count: int
    why: str


NO_C = "the wheel holds no compiled operators (_C)"
NO_ALIAS = "NumPy 1.24 removed np.int, np.float and np.str, and np.bool until NumPy 2"
NO_PKG_RESOURCES = "setuptools 82 removed pkg_resources"
MESHGRID = "torch warns that the default order of meshgrid will change"
ARRAY = "NumPy 2 warns about np.array(tensor): torch's __array__ takes no copy argument"

# fmt: off
PATCHES = (
    # Breaks an import.
    Patch("detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR", 1,
          "Pillow 10 removed Image.LINEAR, another name of BILINEAR"),
    *(Patch(f"detectron2/layers/{name}.py", "from detectron2 import _C", "from detectron2._no_ops import _C", 1, NO_C)
      for name in ("deform_conv", "rotated_boxes", "roi_align_rotated")),
    Patch("detectron2/evaluation/coco_evaluation.py",
          "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n", "", 1, NO_C),
    Patch("detectron2/evaluation/coco_evaluation.py", "\n\nclass COCOEvaluator(DatasetEvaluator):",
          "\nCOCOeval_opt = COCOeval  # no compiled operators: use_fast_impl=True is pycocotools as well\n"
          "\n\nclass COCOEvaluator(DatasetEvaluator):", 1, NO_C + ", which the evaluator uses by default"),
    Patch("detectron2/evaluation/fast_eval_api.py", "from detectron2 import _C\n",
          "from detectron2 import _no_ops\n\n"
          "# An ImportError, so that code with a fallback to pycocotools takes it.\n"
          '_C = _no_ops.refuse("COCOeval_opt")\n', 1, NO_C),
    Patch("detectron2/export/__init__.py", "from .api import *\n",
          "try:\n    from .api import *\nexcept ImportError:  # needs caffe2, which torch 2 does not have\n"
          "    from .._no_ops import Caffe2Tracer, add_export_config  # for tools/deploy/export_model.py\n",
          1, "torch 2 has no caffe2; without this, detectron2.utils.analysis (FLOP counts) does not import"),
    Patch("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", "", 1, NO_PKG_RESOURCES),
    Patch("detectron2/model_zoo/model_zoo.py",
          'pkg_resources.resource_filename(\n'
          '        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
          'os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)', 1, NO_PKG_RESOURCES),

    # Fails or silently does nothing when used.
    Patch("detectron2/data/build.py", "dtype=np.int)", "dtype=int)", 1,
          NO_ALIAS + "; an `except AttributeError` hid it, and the table of instances per class was never printed"),
    Patch("detectron2/data/build.py", "dtype=np.int\n", "dtype=int\n", 1, NO_ALIAS),
    Patch("detectron2/data/common.py", "sample(self._fallback_candidates, k=1)",
          "sample(tuple(self._fallback_candidates), k=1)", 1,
          "random.sample takes no set since Python 3.11, before which it made this tuple itself; so a mapper that "
          "returned None ended the run"),
    Patch("detectron2/data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)", 1, NO_ALIAS),
    Patch("detectron2/evaluation/sem_seg_evaluation.py", "np.array(output, dtype=np.int)", "output.numpy().astype(int)",
          1, NO_ALIAS + "; " + ARRAY),
    Patch("detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", 1, NO_ALIAS),
    Patch("detectron2/evaluation/sem_seg_evaluation.py", "np.float)", "float)", 5, NO_ALIAS),
    Patch("detectron2/evaluation/pascal_voc_evaluation.py", "np.bool)", "bool)", 2, NO_ALIAS),
    Patch("detectron2/structures/masks.py", "np.bool)", "bool)", 3, NO_ALIAS),
    Patch("detectron2/utils/visualizer.py", "np.bool)", "bool)", 3, NO_ALIAS),
    Patch("detectron2/utils/video_visualizer.py", "np.bool)", "bool)", 1, NO_ALIAS),
    Patch("detectron2/engine/hooks.py", "lr_scheduler._LRScheduler)", "lr_scheduler.LRScheduler)", 2,
          "in torch 2 _LRScheduler is a subclass of LRScheduler: torch's own schedulers were silently not saved"),
    Patch("detectron2/engine/defaults.py", 'kwargs["device_ids"] = [comm.get_local_rank()]',
          'on_cpu = next(model.parameters()).device.type == "cpu"\n'
          '        kwargs["device_ids"] = None if on_cpu else [comm.get_local_rank()]', 1,
          "DistributedDataParallel takes no device_ids for a model on the CPU"),
    Patch("detectron2/modeling/meta_arch/retinanet.py", "get_norm(norm, 1)", "get_norm(norm, 32)", 1,
          "only the type of this layer is read, and torch 2 refuses a GroupNorm of 32 groups and 1 channel"),
    Patch("detectron2/layers/deform_conv.py", "deform_conv = _DeformConv.apply\n",
          "def deform_conv(\n"
          "    input, offset, weight, stride=1, padding=0, dilation=1, groups=1, deformable_groups=1, im2col_step=64\n"
          "):\n"
          "    # Without _C: torchvision's operator, which reads both group counts from the shapes.\n"
          "    return deform_conv2d(\n"
          "        input, offset, weight, stride=stride, padding=padding, dilation=dilation\n"
          "    )\n\n\n", 1, NO_C),
    Patch("detectron2/layers/deform_conv.py", "modulated_deform_conv = _ModulatedDeformConv.apply\n",
          "def modulated_deform_conv(\n"
          "    input, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, deformable_groups=1\n"
          "):\n"
          "    return deform_conv2d(\n"
          "        input, offset, weight, bias, stride=stride, padding=padding, dilation=dilation, mask=mask\n"
          "    )\n", 1, NO_C),
    Patch("detectron2/layers/nms.py", "from torchvision.ops import nms  # BC-compat\n",
          "from torchvision.ops import nms  # BC-compat\n\n"
          "from detectron2._no_ops import _C\n\n\n"
          "@torch.jit.ignore  # the callers can be scripted; a scripted call raises too\n"
          "def _nms_rotated(boxes, scores, iou_threshold):\n"
          "    return _C.nms_rotated(boxes, scores, iou_threshold)\n", 1, NO_C),
    Patch("detectron2/layers/nms.py", "return torch.ops.detectron2.nms_rotated(", "return _nms_rotated(", 1, NO_C),

    # Only warns.
    Patch("detectron2/modeling/anchor_generator.py", "meshgrid(shifts_y, shifts_x)",
          'meshgrid(shifts_y, shifts_x, indexing="ij")', 1, MESHGRID),
    Patch("projects/Panoptic-DeepLab/panoptic_deeplab/post_processing.py",
          "torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n",
          'torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n        indexing="ij",\n', 1, MESHGRID),
    Patch("detectron2/engine/train_loop.py", "torch.cuda.amp import", "torch.amp import", 2,
          "torch.cuda.amp is deprecated"),
    Patch("detectron2/engine/train_loop.py", "with autocast():", 'with autocast("cuda"):', 1,
          "torch.amp.autocast has no default device"),
    Patch("detectron2/evaluation/coco_evaluation.py", "np.array(mask[:, :, None],",
          "np.array(mask[:, :, None].numpy(),", 1, ARRAY),
    *(Patch(f"detectron2/{name}.py", "logger.warn(", "logger.warning(", count, "logger.warn is deprecated")
      for name, count in (("data/datasets/coco", 2), ("engine/defaults", 1), ("evaluation/coco_evaluation", 2),
                          ("evaluation/lvis_evaluation", 2), ("evaluation/sem_seg_evaluation", 2))),
)
# fmt: on

# Added alongside the patched files. It is not named _C, so `import detectron2._C` still fails for code that probes it.
NEW_FILES = {
    "detectron2/_no_ops.py": '''\
"""Stands where the compiled operators (detectron2._C) would be and says that they are missing."""


def refuse(name):
    raise ImportError(
        f"{name} needs Detectron2's compiled operators, and this installation has none (it was made by "
        "tools/install_detectron2.py). Uninstall it (pip uninstall detectron2) and build Detectron2 from source."
    )


class _MissingOperators:
    def __getattr__(self, name):
        if name.startswith("__"):  # inspection by copy, pickle or a debugger is no use of an operator
            raise AttributeError(name)
        refuse(name)


_C = _MissingOperators()


def add_export_config(cfg):
    """Stands for detectron2.export.add_export_config, whose one key is caffe2's."""
    return cfg


def Caffe2Tracer(*arguments):
    raise ImportError("Caffe2Tracer needs caffe2, which torch 2 does not have. Trace with TracingAdapter instead.")
'''
}


class InstallError(Exception):
    """Explains to the user what went wrong, in one or two sentences."""


def apply_patches(root: Path, patches=PATCHES) -> None:
    """Apply the table to the source tree at `root`; raise if a text does not occur as often as the table says."""
    for patch in patches:
        path = root / patch.file
        if not path.is_file():
            raise InstallError(f"{patch.file} is not in the source tree; it was to be patched because {patch.why}.")
        text = path.read_text(encoding="utf-8")
        lines = [text.count("\n", 0, match.start()) + 1 for match in re.finditer(re.escape(patch.old), text)]
        if len(lines) != patch.count:
            where = f" (lines {', '.join(map(str, lines))})" if lines else ""
            raise InstallError(
                f"{patch.file}: expected {patch.old!r} {patch.count} time(s), found it {len(lines)} time(s){where}. "
                f"It was to be patched because {patch.why}. The sources are not those of {SDIST}."
            )
        path.write_text(text.replace(patch.old, patch.new), encoding="utf-8")


def describe_patches(patches=PATCHES) -> str:
    """Format the table for the wheel: the license requires stating changes, and later runs compare it."""
    head = f"Changes to the files of {SDIST} (sha256 {SHA256}) by tools/install_detectron2.py.\n"
    rows = [f"\n{m.file} ({m.count}x): {m.why}\n-{m.old!r}\n+{m.new!r}\n" for m in patches]
    return head + "".join(rows) + "".join(f"\n{name}: added\n{text!r}\n" for name, text in NEW_FILES.items())


def build_wheel(root: Path, folder: Path) -> Path:
    """Build a wheel from the patched source tree `root` in `folder`; the same tree gives the same bytes."""
    files = {name: text.encode() for name, text in NEW_FILES.items()}
    for source, target in {"detectron2": "detectron2", **PROJECTS}.items():
        if not (root / source / "__init__.py").is_file():
            raise InstallError(f"{source}/__init__.py is not in the source tree of {SDIST}.")
        for path in (root / source).rglob("*"):
            if path.suffix in (".py", ".yaml") and path.is_file():
                files[f"{target}/{path.relative_to(root / source).as_posix()}"] = path.read_bytes()

    metadata = (
        f"Metadata-Version: 2.1\nName: detectron2\nVersion: {VERSION}\n"
        "Summary: Detectron2 0.6 without compiled operators, mended for current libraries\n"
        "Home-page: https://github.com/facebookresearch/detectron2\nAuthor: FAIR\nLicense: Apache-2.0\n"
        "Requires-Python: >=3.6\n" + "".join(f"Requires-Dist: {name}\n" for name in REQUIRES)
    )
    wheel = "Wheel-Version: 1.0\nGenerator: tools/install_detectron2.py\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{DIST_INFO}/LICENSE"] = (root / "LICENSE").read_bytes()
    files[f"{DIST_INFO}/METADATA"] = metadata.encode()
    files[f"{DIST_INFO}/WHEEL"] = wheel.encode()
    files[f"{DIST_INFO}/{PATCHES_FILE}"] = describe_patches().encode()
    files[f"{DIST_INFO}/top_level.txt"] = b"detectron2\n"

    record = []
    for name, content in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(content)}\n")
    files[f"{DIST_INFO}/RECORD"] = ("".join(record) + f"{DIST_INFO}/RECORD,,\n").encode()

    path = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    # Stored, not deflated, so the bytes do not depend on the machine's zlib.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return path


def check_sdist(path: Path) -> Path:
    """Return `path` if it is the sdist the patches were written for."""
    if not path.is_file():
        raise InstallError(f"{path} is not a file; expected the sdist of {SDIST}.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise InstallError(f"{path} has SHA-256 {found}; expected {SHA256}. Delete it and fetch {SDIST} again.")
    return path


def download_sdist(folder: Path) -> Path:
    """Fetch the sdist with pip, which rejects a wrong hash before running anything in the archive."""
    for name, requirement, digest in (("pip.txt", PIP, PIP_SHA256), ("sdist.txt", SDIST, SHA256)):
        (folder / name).write_text(f"{requirement} --hash=sha256:{digest}\n", encoding="utf-8")
    quiet = ["--quiet", "--require-hashes", "--no-deps"]
    pip("install", *quiet, "--target", str(folder / "pip"), "--requirement", str(folder / "pip.txt"))
    options = ["--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder)]
    older_pip = str(folder / "pip" / "pip")
    pip("download", *quiet, *options, "--requirement", str(folder / "sdist.txt"), program=(older_pip,))
    (path,) = folder.glob("*.tar.gz")
    return check_sdist(path)


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack the sdist and return its top folder."""
    # Python before 3.11.4 has no extraction filters; there only the verified hash vouches for the archive.
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **safe)
    (setup,) = folder.glob("*/setup.py")
    return setup.parent


def pip(*arguments: str, program: tuple[str, ...] = ("-m", "pip")) -> None:
    """Run this environment's pip, or `program`, in this environment; the user sees its output."""
    command = [sys.executable, *program, "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode:
        raise InstallError(
            f"`pip {' '.join(arguments)}` failed; the reason is above. Without a network, fetch the sdist of {SDIST} "
            "elsewhere and give it with --sdist."
        )


def check_tools() -> None:
    """Fail early where pip would fail on the sdist with a misleading message."""
    missing = [name for name in ("torch", "setuptools", "wheel") if importlib.util.find_spec(name) is None]
    if missing:
        raise InstallError(
            f"{', '.join(missing)} not found in {sys.prefix}; Detectron2 needs torch, setuptools and wheel installed "
            f"first: {sys.executable} -m pip install torch setuptools wheel"
        )


def find_installed() -> str | None:
    """Describe this environment's Detectron2; None if there is none. Raise if it is broken."""
    # -P: a `detectron2` folder in the working directory is not an installation.
    probe = "import detectron2, os; print(detectron2.__version__, 'at', os.path.dirname(detectron2.__file__))"
    run = [sys.executable, "-P", "-c"]
    shallow = subprocess.run([*run, probe], capture_output=True, text=True)
    if shallow.returncode:
        if "No module named 'detectron2'" in shallow.stderr:
            return None
        reason = shallow.stderr
    else:
        # `import detectron2` alone says nothing about its operators or the libraries around it.
        deep = subprocess.run([*run, "import detectron2.layers"], capture_output=True, text=True)
        if deep.returncode == 0:
            return shallow.stdout.strip()
        reason = deep.stderr
    last_line = (reason.strip().splitlines() or ["no reason given"])[-1]
    raise InstallError(
        f"A Detectron2 is installed but cannot be imported: {last_line}. Nothing was changed; repair it, or remove it "
        f"({sys.executable} -m pip uninstall detectron2) and run this script again."
    )


def is_outdated() -> bool:
    """Whether this script installed the present Detectron2 with a different patch table."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        installed = distribution("detectron2").read_text(PATCHES_FILE)
    except PackageNotFoundError:
        return False
    return installed is not None and installed != describe_patches()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sdist", type=Path, metavar="FILE", help=f"the sdist of {SDIST}, where pip has no network")
    sdist = parser.parse_args(arguments).sdist
    try:
        outdated = is_outdated()
        if not outdated and (found := find_installed()):
            print(f"Detectron2 {found} is installed already and was left alone.")
            return 0
        check_tools()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            sdist = check_sdist(sdist) if sdist else download_sdist(folder)
            root = unpack(sdist, folder)
            apply_patches(root)
            wheel = build_wheel(root, folder)
            if outdated:
                print("The installed Detectron2 was made by this script from another table of patches; it is replaced.")
                pip("uninstall", "--yes", "--quiet", "detectron2")
            pip("install", "--quiet", str(wheel))
        found = find_installed()
        if not found:
            raise InstallError(f"pip installed the wheel, but {sys.executable} does not find detectron2.")
    except InstallError as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    files = len({patch.file for patch in PATCHES})
    counts = f"{len(PATCHES)} patches in {files} files"
    print(f"Installed Detectron2 {found}: sdist SHA-256 checked, {counts}, no compiled _C.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
