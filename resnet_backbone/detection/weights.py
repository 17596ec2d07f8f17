"""Load MODEL.WEIGHTS into a detector: read and check it against the configuration once, then fill each part by name.

There are two entry points. The training tool calls `read`, builds inside `offered`, then calls `load_whole`. In other
Detectron2 scripts only the registered builders run: the first one to call `fill` opens the file, the others reuse
what it read, and the file is released as soon as the model is assembled.
"""

import contextlib
import logging
import os
import pickle
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
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

from resnet_backbone.engine.config import ConfigError, get_key, said
from resnet_backbone.engine.network_config import (
    NAME,
    current_value,
    fill_from_metadata,
    fill_keys,
    preprocessing_keys,
    same_value,
)
from resnet_backbone.engine.output import last_checkpoint_path
from resnet_backbone.engine.pretrained import command_line_overrides, read_with_overrides
from resnet_backbone.errors import InputError
from resnet_backbone.networks import FrozenBatchNorm2d
from resnet_backbone.weights import Checkpoint, CheckpointError, load_state, read_checkpoint

logger = logging.getLogger(__name__)

OWN_BACKBONES = ("build_network_backbone", "build_network_fpn_backbone", "build_network_retinanet_fpn_backbone")


@dataclass(eq=False)
class Source:
    """The weights for the parts of a model under construction.

    Attributes:
        file: file name for messages; "" for random weights.
        checkpoint: the file's content; None for random weights and for files from Detectron2's trainer.
        detectron2s_own: whether Detectron2's trainer wrote the file, which then does not describe its preprocessing.
        key: the configuration and file identity it was opened for; None if the tool read the file.
        hook: waits for the model; None if the tool read the file.
        counts: maps "backbone" and "head" to their numbers of loaded and total tensors.
        taken: for each tensor loaded into a part, its name in the file, the module that holds it, and its name in that
            module. Weak references, so the source does not keep alive the model that it must be released with.
    """

    file: str
    checkpoint: Checkpoint | None
    detectron2s_own: bool = False
    key: tuple | None = None
    hook: RemovableHandle | None = None
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    taken: list[tuple[str, weakref.ref[nn.Module], str]] = field(default_factory=list)


# The source that `fill` uses: set by `offered` or by a script's first builder; None between models.
_open: Source | None = None


# Called by the tool: read before building, offer to the builders, then load whole detectors.


def read(cfg: CfgNode, last: Checkpoint | None, folder: Path) -> tuple[Checkpoint | None, str]:
    """Return a tool run's initial weights and their file name, and copy the weights' metadata into `cfg`.

    The weights are None for random weights and for a detector of Detectron2's trainer, which does not describe itself.
    With one of Detectron2's backbones, they are None for anything but this project's checkpoints, since Detectron2
    loads it itself.

    Args:
        last: the last checkpoint in `folder`, if the run resumes from it.
        folder: OUTPUT_DIR.

    Raises:
        ConfigError: the configuration contradicts the weights' metadata.
        CheckpointError: the file cannot be read.
    """
    file = str(last_checkpoint_path(folder)) if last else cfg.MODEL.WEIGHTS
    weights = last
    if weights is None and file and is_own(cfg):
        weights = _read_file(cfg)  # None for a detector of Detectron2's trainer
    elif weights is None and file:
        weights = _read_for_stock(file)
    if weights is not None:
        adopt(cfg, weights, file)
    return weights, file


def adopt(cfg: CfgNode, weights: Checkpoint, file: str) -> None:
    """Compare the configuration with the weights' metadata, copy into it what that says, and log it.

    Raises:
        ConfigError: they contradict each other.
    """
    if is_own(cfg):
        fill_from_metadata(cfg, weights.metadata, file)
        _check_heads(cfg, weights, file)
    else:
        _fill_stock(cfg, weights, file)
    logger.info("%s: %s", file, weights.metadata.describe())


@contextlib.contextmanager
def offered(weights: Checkpoint | None, file: str) -> Iterator[None]:
    """Make builders use `weights` instead of MODEL.WEIGHTS (a resumed run starts from another file).

    Weights that Detectron2 will load itself are not offered.
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
    """Load weights that do not go into separate parts into `model`: a detector, or a file in Detectron2's formats.

    Args:
        weights, file: what `read` returned.

    Raises:
        ConfigError: batch normalization would be frozen without statistics.
        CheckpointError: the file does not cover the model, or Detectron2 cannot load it.
    """
    own = is_own(cfg)
    state = None
    if weights is not None and weights.metadata.kind == "detector":
        state = weights.model
        check_frozen_norms(model, weights, file, part="the detector", allowed=_allows_untrained(cfg))
    elif weights is None and own and file:
        state = torch.load(file, map_location="cpu", weights_only=True)["model"]
    if state is not None:
        allowed = cfg.MODEL.NETWORK.ALLOW_MISSING
        logger.info("%s from %s", load_state(model, state, part="detector", source=file, may_miss=allowed), file)
    elif not own:
        if not file:
            check_frozen_norms(model, None, file, part="the detector", allowed=_allows_untrained(cfg))
        try:  # by Detectron2's own rules
            DetectionCheckpointer(model).load(file)
        except (OSError, AssertionError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            detail = " ".join(str(error).split())[:200]
            raise CheckpointError(f"MODEL.WEIGHTS {file} cannot be loaded by Detectron2 ({detail}).") from error


# Called by the registered builders.


def fill(network: nn.Module, cfg: CfgNode, *, part: str) -> None:
    """Load tensors from MODEL.WEIGHTS into some of a network's stages if it is a classifier, and log the counts.

    A detector's checkpoint is loaded after the whole model is built.

    Args:
        network: some stages of the configured network, with the same tensor names as in the file.
        part: name for messages: "backbone", or the head's name in the model.

    Raises:
        ConfigError: the preprocessing or network differs from that of the weights, the stock C4 heads would leave
            conv5_x untrained, or batch normalization would be frozen without statistics.
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
    check_frozen_norms(network, source.checkpoint, source.file, part=part, allowed=_allows_untrained(cfg))


def is_frozen_norm(module: nn.Module) -> bool:
    """Return whether `module` is frozen batch normalization, this package's or Detectron2's."""
    return isinstance(module, (FrozenBatchNorm2d, Detectron2FrozenBatchNorm2d))


def is_own(cfg: CfgNode) -> bool:
    """Return whether the backbone is one of this package's."""
    return cfg.MODEL.BACKBONE.NAME in OWN_BACKBONES


def stock_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Return the metadata arguments of a backbone that Detectron2 built from its own keys."""
    return {"width": cfg.MODEL.NETWORK.WIDTH, "stride_in_1x1": cfg.MODEL.RESNETS.STRIDE_IN_1X1}


# From file to source.


def _source(cfg: CfgNode, network: nn.Module, kind: str) -> Source:
    """Return the source offered or already open for this model, or open MODEL.WEIGHTS for `network`."""
    global _open
    if _open is not None and _open.key is None:
        return _open
    key = (cfg.clone(), command_line_overrides(cfg), _identity(cfg.MODEL.WEIGHTS))
    begins_another_model = _open is not None and kind == "backbone" and kind in _open.counts
    if _open is None or _open.key != key or begins_another_model:
        _let_go()  # free memory before reading the next file
        show_log()
        source = _compared(cfg)
        source.key, source.hook = key, register_module_module_registration_hook(_recognize_model)
        _open = source
        # If a backbone never becomes part of a model, release the file when the backbone is garbage-collected.
        weakref.finalize(next(network.parameters()), _close, weakref.ref(source)).atexit = False
    return _open


def _close(source: weakref.ref[Source]) -> None:
    if _open is not None and _open is source():
        _let_go()


def _let_go() -> None:
    """Release the file that a script's builders opened."""
    global _open
    if _open is not None and _open.hook is not None:
        _open.hook.remove()
    _open = None


def _compared(cfg: CfgNode) -> Source:
    """Read MODEL.WEIGHTS and check that it matches the configuration."""
    file = cfg.MODEL.WEIGHTS
    if not file:
        return Source(file, None)
    checkpoint = _read_file(cfg)
    if checkpoint is None:
        logger.warning(
            "%s was written by Detectron2's trainer and does not say how it was fed; INPUT.FORMAT, MODEL.PIXEL_MEAN, "
            "MODEL.PIXEL_STD and MODEL.RESNETS.STRIDE_IN_1X1 are taken from the configuration as they stand",
            file,
        )
        return Source(file, None, detectron2s_own=True)
    logger.info("%s: %s", file, checkpoint.metadata.describe())
    for key, value in preprocessing_keys(checkpoint.metadata).items():
        current = current_value(cfg, key)
        if not same_value(current, value):
            raise ConfigError(
                f"{key} is {current} in the configuration, but {file} was trained with {value}. "
                f"Set {key} to {value}, or give weights that were trained with {current}."
            )
    _check_heads(cfg, checkpoint, file)
    return Source(file, checkpoint)


def _read_for_stock(file: str) -> Checkpoint | None:
    """Read a checkpoint of this project; return None for anything else, which Detectron2 loads by its own rules."""
    try:
        return read_checkpoint(file)
    except CheckpointError:
        if {"model", "metadata"} <= set(_peek(file)):  # Detectron2 would not notice that it is damaged
            raise
        return None


def _peek(file: str) -> dict[str, Any]:
    """Return the dict in a torch file without reading its tensors; an empty one if it is no such file."""
    try:
        payload = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError):
        return {}
    return payload if isinstance(payload, dict) else {}


def _read_file(cfg: CfgNode) -> Checkpoint | None:
    """Read MODEL.WEIGHTS; return None if it is a detector of Detectron2's trainer."""
    file = cfg.MODEL.WEIGHTS
    if "://" in file and not Path(file).is_file():
        raise CheckpointError(
            f"MODEL.WEIGHTS is {file}, and nothing is downloaded here. Download it, and give the file's path."
        )
    try:
        return read_with_overrides(file, command_line_overrides(cfg))
    except InputError:
        if _is_detectron2_detector(file):
            return None
        raise


def _identity(file: str) -> tuple[int, ...] | None:
    """Return a value that changes when a file is replaced or rewritten; None if the file does not exist."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_detectron2_detector(file: str) -> bool:
    """Return whether Detectron2's own trainer wrote `file`, for a model with one of this package's backbones."""
    payload = _peek(file)
    if "metadata" in payload or not isinstance(payload.get("model"), dict):
        return False
    return any(name.startswith(("backbone.network.", "backbone.bottom_up.network.")) for name in payload["model"])


def _fill_stock(cfg: CfgNode, weights: Checkpoint, file: str) -> None:
    """Check that a checkpoint of this project fits one of Detectron2's backbones; copy its preprocessing into `cfg`."""
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
    # A stock backbone has no name in MODEL.NETWORK.
    fill_keys(cfg, {key: value for key, value in preprocessing_keys(weights.metadata).items() if key != NAME}, file)


def _check_heads(cfg: CfgNode, checkpoint: Checkpoint, file: str) -> None:
    has_roi_heads = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")
    if checkpoint.metadata.kind == "classifier" and cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and has_roi_heads:
        raise ConfigError(
            "MODEL.ROI_HEADS.NAME is Res5ROIHeads, which builds a res5 of its own that no tensor of "
            f"{file} would cover. Set MODEL.ROI_HEADS.NAME to NetworkRes5ROIHeads."
        )
    context = "MODEL.ROI_HEADS.GLOBAL_CONTEXT"
    trained = checkpoint.metadata.config.get(context)
    if trained not in (None, get_key(cfg, context)) and has_roi_heads and not cfg.MODEL.NETWORK.ALLOW_MISSING:
        raise ConfigError(
            f"{said(cfg, context)}, but {file} was trained with {trained}, so that its box predictor has another "
            f"width. Set it to {trained}; or, to train a new predictor, add roi_heads.box_predictor to "
            "MODEL.NETWORK.ALLOW_MISSING."
        )


def _allows_untrained(cfg: CfgNode) -> bool:
    return cfg.MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN


def check_frozen_norms(
    module: nn.Module, checkpoint: Checkpoint | None, file: str, *, part: str, allowed: bool = False
) -> None:
    """Raise ConfigError if `module` has frozen batch normalization whose statistics were never estimated."""
    frozen = sum(is_frozen_norm(m) for m in module.modules())
    estimated = checkpoint is not None and checkpoint.metadata.norm_statistics != "never"
    if frozen and not estimated and not allowed:
        weights = f"{file} never estimated them" if file else "MODEL.WEIGHTS is empty"
        raise ConfigError(
            f"{part} has {frozen} frozen batch normalizations without statistics ({weights}): they would be the "
            "identity, and activations would grow without bound. Give pretrained weights in MODEL.WEIGHTS, set "
            "MODEL.RESNETS.NORM to BN and MODEL.BACKBONE.FREEZE_AT to 0, or set "
            "MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN True to do it anyway."
        )


# Logging in scripts.


def show_log() -> None:
    """Print this package's log as `DefaultTrainer` prints Detectron2's, unless logging is already set up."""
    if not logging.getLogger("resnet_backbone").hasHandlers():
        setup_logger(distributed_rank=comm.get_rank(), name="resnet_backbone")


def _count(counts: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{got} of {has} {kind} tensors" for kind, (got, has) in counts.items())


def _recognize_model(model: nn.Module, name: str, child: nn.Module) -> None:
    """Release the open file when a part loaded from it is added to its model.

    While a file is open, torch calls this whenever a module gets a child. This is the only time we can access a
    script's model: Detectron2 builds all parts first, passes them to the meta-architecture, and does not signal when
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
    """Records what a model loaded from a file, because Detectron2's checkpointer loads MODEL.WEIGHTS into it again.

    A classifier's tensor names differ from the detector's, so the checkpointer would report every tensor as missing.
    As the model's pre-load hook, this recognizes the tensors that its parts already loaded and leaves them in place;
    any other state is loaded unchanged. Either way, the log's last message about weights is true.
    """

    file: str
    counts: dict[str, tuple[int, int]]
    tensors: list[tuple[str, nn.Module, str]]

    @classmethod
    def note(cls, model: nn.Module, source: Source) -> None:
        """Record on `model` what its parts loaded from `source`."""
        tensors = [(name, module, local) for name, owner, local in source.taken if (module := owner()) is not None]
        noted = model.__dict__.get("_taken")
        if noted is None:
            model._taken = cls(source.file, dict(source.counts), tensors)
            model.register_load_state_dict_pre_hook(model._taken)
        else:  # the meta-architecture builds each part in place, so the file was opened once per part
            noted.counts |= source.counts
            noted.tensors += tensors

    def __call__(self, model: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
        if prefix:  # the model is part of a larger module being loaded
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
        # Given only a backbone under Detectron2's names, the checkpointer also matches `res5` to the C4 heads.
        if counts["backbone"][0]:
            self.tensors.clear()  # the model no longer holds them
            logger.info("%s from a detector's checkpoint", _count(counts))


def _holds(state: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> bool:
    return name in state and torch.equal(state[name].to("cpu", tensor.dtype), tensor.detach().cpu())
