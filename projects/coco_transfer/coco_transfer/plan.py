"""What to run: the steps of each network, and their configurations and folders."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from resnet_backbone import detection, pretraining
from resnet_backbone.data.generated import write_classification, write_detection
from resnet_backbone.engine.config import load_config, set_key
from resnet_backbone.engine.output import FINAL
from resnet_backbone.engine.schedule import rescale_for_batch
from resnet_backbone.errors import InputError
from resnet_backbone.networks import VGG, ResNet
from resnet_backbone.networks.catalogue import find_row

SCALES = ("demo", "quarter", "subset", "paper")
STAGES = {"pretrain": "pretraining", "detection": "detection"}  # display name by folder name
CONTEXT = "context"  # a stage of --options: detection with global context, from the first seed's classifier
TITLES = {**STAGES, CONTEXT: "detection with global context"}

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
class Step:
    """A part of a network's work that has a folder of its own.

    Attributes:
        stage: a key of TITLES.
        seed: for initial weights, order and augmentation.
        control: whether it is the control's.
    """

    stage: str
    seed: int
    control: bool = False

    def __str__(self) -> str:
        return f"control, {TITLES[self.stage]}" if self.control else TITLES[self.stage]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The command line of `run.py`.

    Attributes:
        scale: one of SCALES.
        output: folder for everything.
        nets: catalogue names.
        seed: the first, for data (demo), initial weights, order and augmentation.
        processes: number of GPUs, or of CPU processes.
        control: also train each detector from a random backbone.
        parallel: number of networks run concurrently.
        repeat: number of seeds, N for every network or NETWORK:N for one; without any, 1.
        options: the network with which to measure the options of Table 9; None: not measured.
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
    repeat: tuple[str, ...] = ()
    options: str | None = None
    pretrain_data: tuple[str, ...] = ()
    detection_data: tuple[str, ...] = ()
    pretrain_keys: tuple[str, ...] = ()
    detection_keys: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise InputError for an unknown network or key, a bad number, or data the scale does not accept or needs."""
        if self.parallel < 1:
            raise InputError(f"--parallel is {self.parallel}; expected at least 1, the networks to train side by side.")
        if self.parallel > 1 and self.processes > 1:
            raise InputError(
                f"--parallel is {self.parallel} and --num-gpus {self.processes}, so that each of the networks side by "
                "side would take all GPUs. Leave out one of the two."
            )
        named = (
            word.partition(":")[0]
            for words in (self.pretrain_keys[::2], self.detection_keys[::2], self.repeat)
            for word in words
            if ":" in word
        )
        for net in (*self.nets, *named):
            find_row(net)
        self._check_seed()
        self._check_repeat()
        self._check_options()
        if self.scale in ("quarter", "subset") and not (self.pretrain_data and self.detection_data):
            raise InputError(f"--scale {self.scale} needs --pretrain-data TRAIN TEST and --detection-data TRAIN TEST.")
        if self.scale == "demo" and (self.pretrain_data or self.detection_data):
            raise InputError(
                "--scale demo makes its own data; use --scale subset with --pretrain-data and --detection-data."
            )
        for net in self.nets:
            self._load(pretraining.get_config(), net, "pretrain", self.pretrain_keys, seed=self.seed)
            self._load(detection.get_config(), net, "detection", self.detection_keys, seed=self.seed)

    def fixed(self) -> dict[str, Any]:
        """Values that must not change between starts: not the folder, nor what is run and how much at once."""
        free = ("output", "nets", "parallel", "repeat", "options")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}
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

    def seeds(self, net: str) -> range:
        """A network's seeds; --repeat says how many."""
        counts = {owner: int(count) for owner, _, count in (word.rpartition(":") for word in self.repeat)}
        return range(self.seed, self.seed + counts.get(net, counts.get("", 1)))

    def steps(self, net: str, seed: int) -> list[Step]:
        """A network's steps with a seed, in order. Only the first seed has a control, and what --options needs."""
        controls = (False, True) if self.control and seed == self.seed else (False,)
        steps = [Step(stage=stage, seed=seed, control=control) for control in controls for stage in STAGES]
        if net == self.options and seed == self.seed:
            steps += self.context_steps()
        return steps

    def context_steps(self) -> list[Step]:
        """The two detectors with global context that --options needs: one, and another one for an ensemble."""
        return [Step(stage=CONTEXT, seed=seed) for seed in (self.seed, self.seed + 1)]

    def title(self, net: str, seed: int) -> str:
        """How a network with a seed is called."""
        return net if seed == self.seed else f"{net} seed {seed}"

    def folder(self, net: str, step: Step) -> Path:
        """A step's output folder; the first seed's have no number."""
        name = f"control_{step.stage}" if step.control else step.stage
        return self.output / net / (name if step.seed == self.seed else f"{name}_seed{step.seed}")

    def config(self, net: str, step: Step) -> CfgNode:
        """A step's configuration, with the schedule rescaled for its batch as the run would do it."""
        make = {
            "pretrain": self._pretrain_config,
            "detection": self._detection_config,
            CONTEXT: self._context_config,
        }
        cfg = make[step.stage](net, step)
        _set(cfg, "OUTPUT_DIR", str(self.folder(net, step)))
        rescale_for_batch(cfg)
        return cfg

    def _pretrain_config(self, net: str, step: Step) -> CfgNode:
        """Pretraining of `net`; the control runs no iterations: initial weights with estimated BN statistics."""
        cfg = self._load(pretraining.get_config(), net, "pretrain", self.pretrain_keys, seed=step.seed)
        _set(cfg, "DATASETS.TRAIN", self.pretrain_data[:1])
        _set(cfg, "DATASETS.TEST", self.pretrain_data[1:])
        if step.control:
            _set(cfg, "SOLVER.MAX_ITER", 0)
        return cfg

    def _detection_config(self, net: str, step: Step) -> CfgNode:
        """Fine-tuning of `net`'s Faster R-CNN; the control freezes only the BN statistics."""
        cfg = self._load(detection.get_config(), net, "detection", self.detection_keys, seed=step.seed)
        _set(cfg, "DATASETS.TRAIN", self.detection_data[:1])
        _set(cfg, "DATASETS.TEST", self.detection_data[1:])
        if step.control:
            _set(cfg, "MODEL.BACKBONE.FREEZE_AT", 0)
        _set(cfg, "MODEL.WEIGHTS", str(self.folder(net, replace(step, stage="pretrain")) / FINAL))
        return cfg

    def _context_config(self, net: str, step: Step) -> CfgNode:
        """The same fine-tuning with global context."""
        cfg = self._detection_config(net, step)
        _set(cfg, "MODEL.ROI_HEADS.GLOBAL_CONTEXT", True)
        _set(cfg, "MODEL.WEIGHTS", str(self.folder(net, Step(stage="pretrain", seed=self.seed)) / FINAL))
        return cfg

    def _check_options(self) -> None:
        if self.options is None:
            return
        if self.options not in self.nets:
            raise InputError(f"--options is {self.options}, but --nets has only {', '.join(self.nets)}. Add it there.")
        if find_row(self.options).network_class is not ResNet:
            raise InputError(
                f"--options is {self.options}, which has no conv5_x for the global context of Table 9. Name a ResNet."
            )

    def _check_seed(self) -> None:
        keys = (*self.pretrain_keys[::2], *self.detection_keys[::2])
        if "SEED" in (key.rpartition(":")[2] for key in keys):
            raise InputError("the key SEED would give all of a network's runs the same seed. Use --seed instead.")

    def _check_repeat(self) -> None:
        for word in self.repeat:
            owner, colon, count = word.rpartition(":")
            if not count.isdecimal() or int(count) < 1:
                raise InputError(
                    f"--repeat has {word!r}; expected a number of seeds from 1 on, as N or, for one network, NAME:N."
                )
            if colon and owner not in self.nets:
                raise InputError(f"--repeat has {word!r}, but --nets has only {', '.join(self.nets)}. Add it there.")

    def _load(self, cfg: CfgNode, net: str, stage: str, keys: tuple[str, ...], *, seed: int) -> CfgNode:
        shipped_pretrain, shipped_detection, suffix = FAMILIES[find_row(net).network_class]
        load_config(cfg, SHIPPED / (shipped_pretrain if stage == "pretrain" else shipped_detection))
        for name in (f"{stage}.yaml", f"{stage}_{suffix}.yaml", f"{stage}_{net}.yaml"):
            if (HERE / "configs" / self.scale / name).is_file():
                load_config(cfg, HERE / "configs" / self.scale / name)
        _set(cfg, "MODEL.NETWORK.NAME", net)
        _set(cfg, "SEED", seed)
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


def keys_of_one(net: str, keys: tuple[str, ...]) -> list[str]:
    """List the keys that KEY VALUE … gives `net` alone, as NETWORK:KEY."""
    split = (key.partition(":") for key in keys[::2])
    return [key for owner, colon, key in split if colon and owner == net]


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
