"""What to run: networks, seeds, and each run's configuration."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode

from resnet_backbone import pretraining
from resnet_backbone.engine.config import load_config, set_key
from resnet_backbone.errors import InputError
from resnet_backbone.networks import build_network

HERE = Path(__file__).resolve().parent.parent
RECIPES = HERE.parent.parent / "configs" / "pretrain"

# The networks of the paper's Table 6 and Figure 6, by depth.
PLAIN = {depth: f"cifar_plain{depth}" for depth in (20, 32, 44, 56, 110)}
RESIDUAL = {depth: f"cifar_resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)}

# Networks with a recipe other than cifar10.yaml.
OTHER_RECIPES = {
    "cifar_plain110": "cifar10_110.yaml",
    "cifar_resnet110": "cifar10_110.yaml",
    "cifar_resnet1202": "cifar10_110.yaml",
    "cifar_resnet18": "cifar10_walkthrough.yaml",
}


class Scale(NamedTuple):
    """A size of the experiment.

    Attributes:
        networks: trained by default.
        train_images, test_images: use only this many first images per class; None: all.
    """

    networks: tuple[str, ...]
    train_images: int | None = None
    test_images: int | None = None


SCALES = {
    "paper": Scale(
        networks=(*(RESIDUAL[depth] for depth in (20, 32, 44, 56, 110)), *(PLAIN[depth] for depth in (20, 32, 44, 56)))
    ),
    "cpu": Scale(
        networks=(RESIDUAL[20], PLAIN[20], RESIDUAL[56], PLAIN[56]),
        train_images=1000,
        test_images=200,
    ),
    "smoke": Scale(networks=(RESIDUAL[20], PLAIN[20])),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The command line of `run.py`.

    Attributes:
        scale: one of SCALES.
        output: folder for everything.
        data: "cifar10" for the registered names, a folder with `train` and `test`, or an archive of one; None: the
            scale's own.
        networks: catalogue names; empty: the scale's own.
        seeds: train each network with each of these.
        parallel: number of concurrent runs.
        keys: configuration overrides KEY VALUE … on top of the scale's own.
    """

    scale: str
    output: Path
    data: str | None = None
    networks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1,)
    parallel: int = 1
    keys: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise InputError for an unknown network, a key that cannot be set, or data the scale does not accept."""
        if self.scale == "smoke" and self.data is not None:
            raise InputError("--scale smoke makes its own data; leave out --data, or use --scale cpu.")
        if self.parallel < 1 or min(self.seeds) < 0:
            raise InputError(
                f"--parallel is {self.parallel} and --seeds {' '.join(map(str, self.seeds))}; expected at least 1, and "
                "seeds from 0 on."
            )
        for network, _ in self.jobs():
            self.config(network, seed=0)

    def jobs(self) -> list[tuple[str, int]]:
        """Every network with every seed; within a seed, largest network first, so the small ones finish last."""
        networks = sorted(self.networks or SCALES[self.scale].networks, key=parameters, reverse=True)
        return [(network, seed) for seed in dict.fromkeys(self.seeds) for network in dict.fromkeys(networks)]

    def fixed(self) -> dict[str, Any]:
        """Values that must not change when a stopped experiment is restarted."""
        return {"scale": self.scale, "data": self.data, "keys": list(self.keys)}

    def config(self, network: str, *, seed: int) -> CfgNode:
        """A run's configuration, except its data."""
        parameters(network)  # rejects an unknown name and suggests the closest one
        cfg = load_config(pretraining.get_config(), RECIPES / OTHER_RECIPES.get(network, "cifar10.yaml"))
        if (file := HERE / "configs" / f"{self.scale}.yaml").is_file():
            load_config(cfg, file)
        for key, value in (
            ("MODEL.NETWORK.NAME", network),
            ("SEED", seed),
            ("OUTPUT_DIR", str(self.folder(network, seed))),
        ):
            set_key(cfg, key, value, "cifar10")
        return load_config(cfg, None, self.keys)

    def folder(self, network: str, seed: int) -> Path:
        """A run's output folder."""
        return self.output / f"{network}-{seed}"

    def record(self, network: str, seed: int) -> Path:
        """File with a finished run's numbers."""
        return records(self.output) / f"{network}-{seed}.json"


def records(output: Path) -> Path:
    """Folder with the finished runs' numbers."""
    return output / "runs"


def by_family(networks: Collection[str]) -> dict[str, list[str]]:
    """Group `networks` into plain, residual and other, each sorted by depth or name; empty families are omitted."""
    families = {
        "plain": [name for name in PLAIN.values() if name in networks],
        "residual": [name for name in RESIDUAL.values() if name in networks],
        "others": sorted(set(networks) - {*PLAIN.values(), *RESIDUAL.values()}),
    }
    return {family: names for family, names in families.items() if names}


def parameters(network: str, width: float = 1.0) -> int:
    """Parameter count of a ten-class network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_network(network, 10, width=width).parameters())
