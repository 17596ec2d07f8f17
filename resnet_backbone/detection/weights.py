"""MODEL.WEIGHTS of a detector: read once, compared once with the configuration, and handed to each part by name.

There are two ways in. The training tool calls `read`, builds inside `offered`, and calls `load_whole`. In anybody
else's Detectron2 script only the registered builders run: the first of them that calls `fill` opens the file, the
others take their tensors from what it has read, and the file is let go as soon as the model is put together.
"""

import contextlib
import logging
import os
import pickle
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d as Detectron2FrozenBatchNorm2d
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from resnet_backbone.engine.config import ConfigError, get_key, origin, set_key
from resnet_backbone.engine.network_config import fill_from_metadata, preprocessing_keys, same_value
from resnet_backbone.engine.output import LAST
from resnet_backbone.engine.pretrained import command_line_overrides, read_with_overrides
from resnet_backbone.errors import InputError
from resnet_backbone.networks import FrozenBatchNorm2d
from resnet_backbone.weights import Checkpoint, CheckpointError, load_state, read_checkpoint

logger = logging.getLogger(__name__)

OWN_BACKBONES = ("build_network_backbone", "build_network_fpn_backbone", "build_network_retinanet_fpn_backbone")


@dataclass(eq=False)
class Source:
    """What the parts of a model under construction take their weights from.

    Attributes:
        file: its name in messages; "" for random weights.
        checkpoint: what is in it; None for random weights and for what Detectron2's trainer wrote.
        detectron2s_own: Detectron2's trainer wrote the file: nothing in it says how it was fed.
        key: the configuration and the file's identity that it was opened for; None where the tool has read it.
        hook: waits for the model; None where the tool has read the file.
        counts: "backbone" and "head" to how many tensors they got, and have.
        taken: of each tensor that a part got, the name in the file, the module that holds it, and the name in that. The
            modules are held weakly: the file must not keep alive the model whose end is its own.
    """

    file: str
    checkpoint: Checkpoint | None
    detectron2s_own: bool = False
    key: tuple | None = None
    hook: RemovableHandle | None = None
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    taken: list[tuple[str, weakref.ref[nn.Module], str]] = field(default_factory=list)


# What `fill` takes from: set by `offered`, or by the first builder of a script; None between two models.
_open: Source | None = None


# What the tool calls: read before anything is built, offer to the builders, load what is a whole detector.


def read(cfg: CfgNode, last: Checkpoint | None, folder: Path) -> tuple[Checkpoint | None, str]:
    """The weights that a run of the tool starts from, their metadata entered into `cfg`, and the file's name.

    None for random weights, and for anything but this project's checkpoints with one of Detectron2's backbones, which
    Detectron2 itself loads.

    Args:
        last: the last checkpoint in `folder`, where the run is to go on with it.
        folder: OUTPUT_DIR.

    Raises:
        ConfigError: the configuration contradicts what the weights say.
        CheckpointError: the file cannot be read.
    """
    file = str(folder / (folder / LAST).read_text().strip()) if last else cfg.MODEL.WEIGHTS
    weights = last
    if is_own(cfg):
        _follow_depth(cfg)
        if weights is None and file:
            weights = _read_file(cfg)
        if weights is not None:
            fill_from_metadata(cfg, weights.metadata, file)
            _check_heads(cfg, weights, file)
    elif weights is None and file:
        with contextlib.suppress(CheckpointError):
            weights = read_checkpoint(file)
    if not is_own(cfg) and weights is not None:
        if weights.metadata.kind == "classifier":
            raise ConfigError(
                f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}, but {file} was written by tools/pretrain.py for "
                f"one of {', '.join(OWN_BACKBONES)}. Set MODEL.BACKBONE.NAME to it."
            )
        if weights.metadata.architecture != cfg.MODEL.BACKBONE.NAME:
            raise ConfigError(
                f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}, but {file} holds a detector with "
                f"{weights.metadata.architecture}. Give the configuration that it was trained with."
            )
        # A stock backbone has no name and width in MODEL.NETWORK; the preprocessing is what remains to agree.
        preprocessing = replace(weights.metadata, architecture=cfg.MODEL.NETWORK.NAME, arguments=stock_arguments(cfg))
        fill_from_metadata(cfg, preprocessing, file)
    if weights is not None:
        logger.info("%s: %s", file, weights.metadata.describe())
    return weights, file


@contextlib.contextmanager
def offered(weights: Checkpoint | None, file: str) -> Iterator[None]:
    """Inside, the builders take from `weights`, whatever MODEL.WEIGHTS names (a resumed run starts from another file).

    What Detectron2 is going to load is not offered.
    """
    global _open
    if weights is None and file:
        yield
        return
    _open = Source(file, weights)
    try:
        yield
    finally:
        _open = None


def load_whole(cfg: CfgNode, model: nn.Module, weights: Checkpoint | None, file: str) -> None:
    """Load into the built `model` what does not go to its parts: a detector, or a file of Detectron2's formats.

    Raises:
        ConfigError: batch normalization would be frozen without statistics.
        CheckpointError: the file does not cover the model, or Detectron2 cannot load it.
    """
    if weights is not None and weights.metadata.kind == "detector":
        allowed = cfg.MODEL.NETWORK.ALLOW_MISSING
        logger.info(
            "%s from %s", load_state(model, weights.model, part="detector", source=file, may_miss=allowed), file
        )
        _check_frozen_norms(cfg, model, weights, file, part="the detector")
    elif not is_own(cfg):
        if not file:
            _check_frozen_norms(cfg, model, None, file, part="the detector")
        try:  # by Detectron2's own rules
            DetectionCheckpointer(model).load(file)
        except (OSError, AssertionError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            detail = " ".join(str(error).split())[:200]
            raise CheckpointError(f"MODEL.WEIGHTS {file} cannot be loaded by Detectron2 ({detail}).") from error


# What the registered builders call.


def fill(network: nn.Module, cfg: CfgNode, *, part: str) -> None:
    """Give a run of a network's stages its tensors of MODEL.WEIGHTS, where that is a classifier, and log the counts.

    A detector's checkpoint is loaded after the whole model is built.

    Args:
        network: some stages of MODEL.NETWORK.NAME, whose names are the file's.
        part: its name in messages: "backbone", or that of the head in the model.

    Raises:
        ConfigError: the preprocessing or the network differs from the weights', the stock C4 heads would leave conv5_x
            untrained, or batch normalization would be frozen without statistics.
        CheckpointError: the file cannot be read or does not cover the network.
    """
    kind = "backbone" if part == "backbone" else "head"
    source = _source(cfg, network, kind)
    if source.detectron2s_own:
        return
    if source.checkpoint is not None and source.checkpoint.metadata.kind == "classifier":
        allowed = cfg.MODEL.NETWORK.ALLOW_MISSING
        report = load_state(network, source.checkpoint.model, part=part, source=source.file, may_miss=allowed)
        got, has = source.counts.get(kind, (0, 0))
        more = len(report.loaded)
        source.counts[kind] = (got + more, has + more + len(report.missing))
        for name in report.loaded:
            path, _, local = name.rpartition(".")
            source.taken.append((name, weakref.ref(network.get_submodule(path)), local))
        logger.info("%s from %s", _count(source.counts), source.file)
    _check_frozen_norms(cfg, network, source.checkpoint, source.file, part=part)


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether `module` is batch normalization with fixed statistics, this package's or Detectron2's."""
    return isinstance(module, (FrozenBatchNorm2d, Detectron2FrozenBatchNorm2d))


def is_own(cfg: CfgNode) -> bool:
    """Whether the backbone is one of this package's."""
    return cfg.MODEL.BACKBONE.NAME in OWN_BACKBONES


def stock_arguments(cfg: CfgNode) -> dict[str, Any]:
    """What metadata says of a backbone that Detectron2 built from its own keys."""
    return {"width": cfg.MODEL.NETWORK.WIDTH, "stride_in_1x1": cfg.MODEL.RESNETS.STRIDE_IN_1X1}


# From the file to a source.


def _source(cfg: CfgNode, network: nn.Module, kind: str) -> Source:
    """What is offered or already open for this model; else MODEL.WEIGHTS, opened now for `network`."""
    global _open
    if _open is not None and _open.key is None:
        return _open
    key = (cfg.clone(), command_line_overrides(cfg), _identity(cfg.MODEL.WEIGHTS))
    begins_another_model = _open is not None and kind == "backbone" and kind in _open.counts
    if _open is None or _open.key != key or begins_another_model:
        _let_go()  # before the next file takes its memory
        _show_log()
        source = _compared(cfg)
        source.key, source.hook = key, register_module_module_registration_hook(_recognize_model)
        _open = source
        # A backbone that is built alone, and never becomes a part of a model, takes the file with it when it goes.
        weakref.finalize(next(network.parameters()), _close, weakref.ref(source)).atexit = False
    return _open


def _close(source: weakref.ref[Source]) -> None:
    if _open is not None and _open is source():
        _let_go()


def _let_go() -> None:
    """Forget the file that a script's builders have opened."""
    global _open
    if _open is not None and _open.hook is not None:
        _open.hook.remove()
    _open = None


def _compared(cfg: CfgNode) -> Source:
    """MODEL.WEIGHTS, read and found to agree with the configuration."""
    file = cfg.MODEL.WEIGHTS
    if not file:
        return Source(file, None)
    try:
        checkpoint = _read_file(cfg)
    except InputError:
        if not _is_detectron2_detector(file):
            raise
        logger.warning(
            "%s was written by Detectron2's trainer and does not say how it was fed; INPUT.FORMAT, MODEL.PIXEL_MEAN, "
            "MODEL.PIXEL_STD and MODEL.RESNETS.STRIDE_IN_1X1 are taken from the configuration as they stand",
            file,
        )
        return Source(file, None, detectron2s_own=True)
    logger.info("%s: %s", file, checkpoint.metadata.describe())
    for key, value in preprocessing_keys(checkpoint.metadata).items():
        if not same_value(get_key(cfg, key), value):
            raise ConfigError(
                f"{key} is {get_key(cfg, key)} in the configuration, but {file} was trained with {value}. "
                f"Set {key} to {value}, or give weights that were trained with {get_key(cfg, key)}."
            )
    _check_heads(cfg, checkpoint, file)
    return Source(file, checkpoint)


def _read_file(cfg: CfgNode) -> Checkpoint:
    file = cfg.MODEL.WEIGHTS
    if "://" in file and not Path(file).is_file():
        raise CheckpointError(
            f"MODEL.WEIGHTS is {file}, and nothing is downloaded here. Download it, and give the file's path."
        )
    return read_with_overrides(file, command_line_overrides(cfg))


def _identity(file: str) -> tuple[int, ...] | None:
    """What changes when a file is replaced or written again; None where there is none."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_detectron2_detector(file: str) -> bool:
    """Whether `file` is what Detectron2's own trainer writes for a model with one of this package's backbones."""
    try:
        payload = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError):
        return False
    if not isinstance(payload, dict) or "metadata" in payload or not isinstance(payload.get("model"), dict):
        return False
    return any(name.startswith(("backbone.network.", "backbone.bottom_up.network.")) for name in payload["model"])


def _follow_depth(cfg: CfgNode) -> None:
    """A stock configuration says RESNETS.DEPTH where this package's says NETWORK.NAME, which by default is another."""
    depth = origin(cfg, "MODEL.RESNETS.DEPTH")
    if depth is not None and origin(cfg, "MODEL.NETWORK.NAME") is None:
        set_key(cfg, "MODEL.NETWORK.NAME", f"resnet{cfg.MODEL.RESNETS.DEPTH}", f"MODEL.RESNETS.DEPTH of {depth}")


def _check_heads(cfg: CfgNode, checkpoint: Checkpoint, file: str) -> None:
    has_roi_heads = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")
    if checkpoint.metadata.kind == "classifier" and cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and has_roi_heads:
        raise ConfigError(
            "MODEL.ROI_HEADS.NAME is Res5ROIHeads, which builds a res5 of its own that no tensor of "
            f"{file} would cover. Set MODEL.ROI_HEADS.NAME to NetworkRes5ROIHeads."
        )


def _check_frozen_norms(
    cfg: CfgNode, module: nn.Module, checkpoint: Checkpoint | None, file: str, *, part: str
) -> None:
    """Raise ConfigError if `module` has frozen batch normalization whose statistics nobody ever estimated."""
    frozen = sum(is_frozen_norm(m) for m in module.modules())
    estimated = checkpoint is not None and checkpoint.metadata.norm_statistics != "never"
    if frozen and not estimated and not cfg.MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN:
        weights = f"{file} never estimated them" if file else "MODEL.WEIGHTS is empty"
        raise ConfigError(
            f"{part} has {frozen} frozen batch normalizations without statistics ({weights}): they would be the "
            "identity, and activations would grow without bound. Give pretrained weights in MODEL.WEIGHTS, set "
            "MODEL.RESNETS.NORM to BN and MODEL.BACKBONE.FREEZE_AT to 0, or set "
            "MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN True to do it anyway."
        )


# What a script's log says.


def _show_log() -> None:
    """Print this package's log as `DefaultTrainer` prints Detectron2's, unless somebody has set logging up."""
    if not logging.getLogger("resnet_backbone").hasHandlers():
        setup_logger(distributed_rank=comm.get_rank(), name="resnet_backbone")


def _count(counts: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{got} of {has} {kind} tensors" for kind, (got, has) in counts.items())


def _recognize_model(model: nn.Module, name: str, child: nn.Module) -> None:
    """When a part with weights of the open file is put into its model, let the file go.

    While a file is open, torch calls this whenever a module gets a child. It is the one moment at which a script's
    model is within reach: Detectron2 builds all parts first, hands them to the meta-architecture, and tells nobody when
    it is done.
    """
    source = _open
    if source is None:
        return
    architecture = dict(META_ARCH_REGISTRY).get(source.key[0].MODEL.META_ARCHITECTURE)
    if not isinstance(architecture, type) or not isinstance(model, architecture):
        return
    modules = set(child.modules())
    if not source.taken or any(owner() in modules for _, owner, _ in source.taken):
        _let_go()
        _Taken.note(model, source)


@dataclass
class _Taken:
    """What a model has taken from a file, for Detectron2's checkpointer, which loads MODEL.WEIGHTS into it once more.

    A classifier's names are not the detector's, so the checkpointer would list every tensor as not found. As a hook of
    the model before loading, this recognizes the tensors that the parts were given and leaves them where they are; any
    other state is loaded as it is. Either way the log's last words about weights are true.
    """

    file: str
    counts: dict[str, tuple[int, int]]
    tensors: list[tuple[str, nn.Module, str]]

    @classmethod
    def note(cls, model: nn.Module, source: Source) -> None:
        """Remember with `model` what its parts took from `source`."""
        tensors = [(name, module, local) for name, owner, local in source.taken if (module := owner()) is not None]
        noted = model.__dict__.get("_taken")
        if noted is None:
            model._taken = cls(source.file, dict(source.counts), tensors)
            model.register_load_state_dict_pre_hook(model._taken)
        else:  # a meta-architecture that builds each part where it puts it, so that the file was opened for each
            noted.counts |= source.counts
            noted.tensors += tensors

    def __call__(self, model: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
        if prefix:  # the model is itself a part of what is loaded
            return
        own = model.state_dict()
        counted = [name for name in own if not name.endswith("num_batches_tracked")]
        if self.tensors and all(_holds(state, name, getattr(owner, local)) for name, owner, local in self.tensors):
            state.clear()
            state.update(own)
            others = len(counted) - len(self.tensors)
            logger.info("%s from %s; the other %d tensors are new", _count(self.counts), self.file, others)
            return
        counts = {}
        for kind in ("backbone", "head"):
            names = [name for name in counted if name.startswith("backbone.") == (kind == "backbone")]
            counts[kind] = (sum(name in state for name in names), len(names))
        # Of a backbone alone under Detectron2's names, the checkpointer matches `res5` with the C4 heads' once more.
        if counts["backbone"][0]:
            self.tensors.clear()  # the model no longer holds them
            logger.info("%s from a detector's checkpoint", _count(counts))


def _holds(state: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> bool:
    return name in state and torch.equal(state[name].to("cpu", tensor.dtype), tensor.detach().cpu())
