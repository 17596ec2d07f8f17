"""What to run: the configuration for each network and stage."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from resnet_backbone import detection, pretraining
from resnet_backbone.data.generated import write_classification, write_detection
from resnet_backbone.engine.config import load_config, set_key
from resnet_backbone.engine.output import FINAL
from resnet_backbone.errors import InputError
from resnet_backbone.networks import VGG, ResNet, build_network

SCALES = ("demo", "quarter", "subset", "paper")
STAGES = {"pretrain": "pretraining", "detection": "detection"}  # display name by folder name

HERE = Path(__file__).resolve().parent.parent
SHIPPED = HERE.parent.parent / "configs"

# Per network family: the shipped configurations of both stages, and the suffix of a scale's own configurations.
FAMILIES = {
    ResNet: ("pretrain/imagenet.yaml", "faster_rcnn_R101.yaml", "resnet"),
    VGG: ("pretrain/imagenet_vgg.yaml", "faster_rcnn_VGG16.yaml", "vgg"),
}

DEMO_CLASSIFICATION = {"train": 16000, "test": 1600}  # images in the generated sets
DEMO_DETECTION = {"train": 1500, "test": 200}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The command line of `run.py`.

    Attributes:
        scale: one of SCALES.
        output: folder for everything.
        nets: catalogue names.
        seed: for data (demo), initial weights, order and augmentation.
        processes: number of GPUs, or of CPU processes.
        control: also train each detector from a random backbone.
        parallel: number of networks run concurrently.
        pretrain_data, detection_data: entries of DATASETS.TRAIN and DATASETS.TEST; empty: the scale's own.
        pretrain_keys, detection_keys: configuration overrides on top of the scale's own, KEY VALUE for every network or
            NETWORK:KEY VALUE for one.
    """

    scale: str
    output: Path
    nets: tuple[str, ...] = ("vgg16", "resnet101")
    seed: int = 1
    processes: int = 1
    control: bool = True
    parallel: int = 1
    pretrain_data: tuple[str, ...] = ()
    detection_data: tuple[str, ...] = ()
    pretrain_keys: tuple[str, ...] = ()
    detection_keys: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise InputError for an unknown network or key, or for data the scale does not accept or is missing."""
        if self.parallel < 1:
            raise InputError(f"--parallel is {self.parallel}; expected at least 1, the networks to train side by side.")
        if self.parallel > 1 and self.processes > 1:
            raise InputError(
                f"--parallel is {self.parallel} and --num-gpus {self.processes}, so that each of the networks side by "
                "side would take all GPUs. Leave out one of the two."
            )
        named = (
            key.partition(":")[0]
            for keys in (self.pretrain_keys, self.detection_keys)
            for key in keys[::2]
            if ":" in key
        )
        for net in (*self.nets, *named):
            _family(net)
        if self.scale in ("quarter", "subset") and not (self.pretrain_data and self.detection_data):
            raise InputError(f"--scale {self.scale} needs --pretrain-data TRAIN TEST and --detection-data TRAIN TEST.")
        if self.scale == "demo" and (self.pretrain_data or self.detection_data):
            raise InputError(
                "--scale demo makes its own data; use --scale subset with --pretrain-data and --detection-data."
            )
        for net in self.nets:
            self._load(pretraining.get_config(), net, "pretrain", self.pretrain_keys)
            self._load(detection.get_config(), net, "detection", self.detection_keys)

    def fixed(self) -> dict[str, Any]:
        """Values that must not change between starts: all but the folder, the networks and how many run at once."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("output", "nets", "parallel")}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def with_data(self) -> "Plan":
        """Return this plan with training data: the given, the scale's own or, for the demo, newly generated."""
        own = {
            "demo": self._generated,
            "quarter": lambda: ((), ()),
            "subset": lambda: ((), ()),
            "paper": lambda: (("imagenet_train", "imagenet_val"), ("coco_2014_train", "coco_2014_val")),
        }[self.scale]()
        return replace(self, pretrain_data=self.pretrain_data or own[0], detection_data=self.detection_data or own[1])

    def stages(self) -> list[tuple[str, bool]]:
        """Each network's stages in order: a key of STAGES, and whether the stage is the control's."""
        return [(stage, control) for control in ((False, True) if self.control else (False,)) for stage in STAGES]

    def config(self, net: str, stage: str, *, control: bool = False) -> CfgNode:
        """A stage's configuration."""
        return {"pretrain": self.pretrain_config, "detection": self.detection_config}[stage](net, control=control)

    def pretrain_config(self, net: str, *, control: bool = False) -> CfgNode:
        """Pretraining of `net`; the control runs no iterations: initial weights with estimated BN statistics."""
        cfg = self._load(pretraining.get_config(), net, "pretrain", self.pretrain_keys)
        _set(cfg, "DATASETS.TRAIN", self.pretrain_data[:1])
        _set(cfg, "DATASETS.TEST", self.pretrain_data[1:])
        if control:
            _set(cfg, "SOLVER.MAX_ITER", 0)
        _set(cfg, "OUTPUT_DIR", str(self.folder(net, "pretrain", control=control)))
        return cfg

    def detection_config(self, net: str, *, control: bool = False) -> CfgNode:
        """Fine-tuning of `net`'s Faster R-CNN; the control freezes only the BN statistics."""
        cfg = self._load(detection.get_config(), net, "detection", self.detection_keys)
        _set(cfg, "DATASETS.TRAIN", self.detection_data[:1])
        _set(cfg, "DATASETS.TEST", self.detection_data[1:])
        if control:
            _set(cfg, "MODEL.BACKBONE.FREEZE_AT", 0)
        _set(cfg, "MODEL.WEIGHTS", str(self.folder(net, "pretrain", control=control) / FINAL))
        _set(cfg, "OUTPUT_DIR", str(self.folder(net, "detection", control=control)))
        return cfg

    def folder(self, net: str, stage: str, *, control: bool = False) -> Path:
        """A stage's output folder."""
        return self.output / net / (f"control_{stage}" if control else stage)

    def _load(self, cfg: CfgNode, net: str, stage: str, keys: tuple[str, ...]) -> CfgNode:
        shipped_pretrain, shipped_detection, suffix = FAMILIES[_family(net)]
        load_config(cfg, SHIPPED / (shipped_pretrain if stage == "pretrain" else shipped_detection))
        for name in (f"{stage}.yaml", f"{stage}_{suffix}.yaml", f"{stage}_{net}.yaml"):
            if (HERE / "configs" / self.scale / name).is_file():
                load_config(cfg, HERE / "configs" / self.scale / name)
        _set(cfg, "MODEL.NETWORK.NAME", net)
        _set(cfg, "SEED", self.seed)
        return load_config(cfg, None, _keys_of(net, keys))

    def _generated(self) -> tuple[tuple[str, str], tuple[str, str]]:
        data = self.output / "data"
        pretrain = [
            write_classification(data / f"classification_{part}", images=count, seed=self.seed + offset)
            for offset, (part, count) in zip((0, 1000), DEMO_CLASSIFICATION.items(), strict=True)
        ]
        detect = [
            str(write_detection(data / f"detection_{part}", images=count, seed=self.seed + offset))
            for offset, (part, count) in zip((2000, 3000), DEMO_DETECTION.items(), strict=True)
        ]
        return tuple(pretrain), tuple(detect)


def _family(net: str) -> type:
    """Look up a network's class by name; raise InputError if unknown."""
    with torch.device("meta"):
        return type(build_network(net))


def _keys_of(net: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Select what applies to `net` from KEY VALUE … and NETWORK:KEY VALUE …, its own last."""
    if len(keys) % 2:
        return keys  # load_config will reject it
    shared, own = [], []
    for key, value in zip(keys[::2], keys[1::2], strict=True):
        owner, colon, rest = key.partition(":")
        if not colon:
            shared += [key, value]
        elif owner == net:
            own += [rest, value]
    return (*shared, *own)


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    set_key(cfg, key, value, "coco_transfer")
