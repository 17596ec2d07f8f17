"""Map other libraries' tensor names to ours.

Our names are torchvision's. The mapping also yields entries that our networks lack and `convert` folds into a norm:
`conv1.bias` and the like where a norm follows the convolution, and Caffe's `bn1.scale_factor`.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# A name unique to each format. Order matters: timm's VGG has torchvision's features.0.weight too.
_SIGNATURES = {
    "caffe2": r"conv1_w",
    "keras": r"(conv1_conv|block1_conv1)/kernel(:0)?",
    "caffe": r"(conv1|conv1_1)/0",
    "timm": r"stem\.conv\.weight|pre_logits\.fc1\.weight",
    "detectron2": r"(backbone\.(bottom_up\.)?)?stem\.conv1\.weight",
    "torchvision": r"conv1\.weight|features\.0\.weight",
}

FORMATS = tuple(_SIGNATURES)

_HEAD = "belongs to the detector's heads, not to the backbone"
_OPTIMIZER = "optimizer state"
_DROPPED = {
    "caffe2": (
        (r".*_momentum", _OPTIMIZER),
        (r"(conv_rpn|rpn|fpn|cls_score|bbox_pred|fc6|fc7|mask|_\[mask\]|conv5_mask|kps|conv_fcn|retnet)_.*", _HEAD),
    ),
    "detectron2": (
        (r"(proposal_generator|roi_heads(?!\.res5)|head|sem_seg_head|backbone\.top_block)\..*|backbone\.fpn_.*", _HEAD),
        (r"pixel_(mean|std)", "the detector's preprocessing, entered into the metadata"),
    ),
}


@dataclass(frozen=True)
class KeyMapping:
    """All keys of a file, each in one of three places.

    Attributes:
        mapped: the file's keys to ours.
        dropped: the file's keys to the reason the network does not need them.
        unknown: keys that the format's rules do not explain.
    """

    mapped: dict[str, str]
    dropped: dict[str, str]
    unknown: tuple[str, ...]


def recognize(names: Iterable[str]) -> str | None:
    """Recognize the format these names belong to; None if it is not in `FORMATS`.

    timm's ResNets and our own use torchvision's names, so they are recognized as "torchvision".
    """
    names = list(names)
    for format, pattern in _SIGNATURES.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return format
    return None


def prefix_of(name: str) -> str | None:
    """Return what stands before a name of a format's own: "model." for "model.conv1.weight"; None for other names."""
    for pattern in _SIGNATURES.values():
        if match := re.fullmatch(rf"((?:\w+\.)+?)(?:{pattern})", name):
            return match[1]
    return None


def map_keys(format: str, names: Iterable[str]) -> KeyMapping:
    """Map every key of a file in `format` to ours where its rules cover it."""
    names = list(names)
    translate = _TRANSLATORS[format](names)
    mapped, dropped, unknown = {}, {}, []
    for name in names:
        reasons = [reason for pattern, reason in _DROPPED.get(format, ()) if re.fullmatch(pattern, name)]
        if (ours := translate(name)) is not None:
            mapped[name] = ours
        elif reasons:
            dropped[name] = reasons[0]
        else:
            unknown.append(name)
    return KeyMapping(mapped, dropped, tuple(unknown))


def detectron2_name(ours: str) -> str | None:
    """Detectron2's name for a residual network's tensor; None if its networks have no counterpart."""
    stem = re.fullmatch(r"(conv1|bn1)\.(\w+)", ours)
    if stem:
        return f"stem.conv1.{'norm.' if stem[1] == 'bn1' else ''}{stem[2]}"
    block = re.fullmatch(r"layer([1-4])\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))\.(\w+)", ours)
    if block:
        stage, index, kind, conv, shortcut, entry = block.groups()
        layer = f"conv{conv}" if conv else "shortcut"
        is_norm = kind == "bn" or shortcut == "1"
        return f"res{int(stage) + 1}.{index}.{layer}.{'norm.' if is_norm else ''}{entry}"
    classifier = re.fullmatch(r"fc\.(weight|bias)", ours)
    return f"linear.{classifier[1]}" if classifier else None


def _residual(stage: str | int, block: str | int, conv: str | int, is_norm: bool, entry: str) -> str:
    """Our name for an entry in stage `stage` (2 to 5, or 1 for the stem); convolution 0 is the shortcut's."""
    place = "" if int(stage) == 1 else f"layer{int(stage) - 1}.{block}."
    if int(conv) == 0:
        return f"{place}downsample.{int(is_norm)}.{entry}"
    return f"{place}{'bn' if is_norm else 'conv'}{conv}.{entry}"


Translator = Callable[[str], str | None]


def _torchvision(names: list[str]) -> Translator:
    return lambda name: name


def _timm(names: list[str]) -> Translator:
    """Translate timm's VGG, whose classifier is convolutional, and its pre-activation networks.

    Where a stage starts with a projection, timm puts the norm before it in the block; ours ends the previous stage or
    the stem.
    """
    stages = 1 + max((int(m[1]) for name in names if (m := re.match(r"stages\.(\d+)\.", name))), default=0)
    is_vgg = "features.0.weight" in names
    fully_connected = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3"}

    def translate(name: str) -> str | None:
        module, _, entry = name.rpartition(".")
        if module == "head.fc":
            return f"classifier.6.{entry}" if is_vgg else f"fc.{entry}"
        if is_vgg:
            return name if module.startswith("features.") else _joined(fully_connected.get(module), entry)
        if module == "stem.conv":
            return f"conv1.{entry}"
        if module == "norm":
            return f"layer{stages}.norm.{entry}"
        match = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(?:(conv|norm)(\d)|downsample\.conv)", module)
        if not match:
            return None
        stage, block, kind, number = int(match[1]), int(match[2]), match[3], match[4]
        if kind is None:
            return f"layer{stage + 1}.{block}.downsample.{entry}"
        if kind == "norm" and (block, number) == (0, "1"):
            return f"bn1.{entry}" if stage == 0 else f"layer{stage}.norm.{entry}"
        return f"layer{stage + 1}.{block}.{'bn' if kind == 'norm' else 'conv'}{number}.{entry}"

    return translate


def _detectron2(names: list[str]) -> Translator:
    """Translate a backbone alone, inside a detector, or, for C4 detectors, with its last stage in the RoI heads."""
    place = r"(?:backbone\.(?:bottom_up\.)?|roi_heads\.(?=res5\.))?(?:stem|res([2-5])\.(\d+))"
    layer = re.compile(place + r"\.(?:conv(\d)|shortcut)\.(norm\.)?(\w+)")
    # Detectron2's own classifier is `linear`; its script for converting torchvision files leaves `stem.fc`.
    classifier = re.compile(r"(?:backbone\.(?:bottom_up\.)?)?(?:linear|stem\.fc)\.(weight|bias)")

    def translate(name: str) -> str | None:
        if match := layer.fullmatch(name):
            stage, block, conv, norm, entry = match.groups()
            return _residual(stage or 1, block or 0, conv or 0, norm is not None, entry)
        match = classifier.fullmatch(name)
        return f"fc.{match[1]}" if match else None

    return translate


def _caffe2(names: list[str]) -> Translator:
    """Translate MSRA's and Detectron's names, in the variants that Detectron2 reads."""
    conv_entries = {"w": "weight", "b": "bias"}
    norm_entries = {
        **{"s": "weight", "gamma": "weight", "b": "bias", "beta": "bias"},
        # Despite the name (inverse variance), Caffe2 stores the variance here, and Detectron2 loads it as such.
        **{"rm": "running_mean", "running_mean": "running_mean", "riv": "running_var", "running_var": "running_var"},
    }
    stem = re.compile(r"(?:conv1|res_(conv1)_bn)_([a-z_]+)")
    block = re.compile(r"res(\d)_(\d+)_branch(1|2[abc])_(bn_)?([a-z_]+)")

    def translate(name: str) -> str | None:
        if match := stem.fullmatch(name):
            stage, index, conv, norm, entry = 1, 0, 1, match[1], match[2]
        elif match := block.fullmatch(name):
            stage, index, branch, norm, entry = match.groups()
            conv = 0 if branch == "1" else "_abc".index(branch[1])
        else:
            match = re.fullmatch(r"(?:fc1000|pred)_([wb])", name)
            return f"fc.{conv_entries[match[1]]}" if match else None
        entry = (norm_entries if norm else conv_entries).get(entry)
        return entry and _residual(stage, index, conv, norm is not None, entry)

    return translate


def _keras(names: list[str]) -> Translator:
    """Translate keras.applications' ResNet-50/101/152 and VGG-16/19, with Keras 2's `:0` suffix or Keras 3's none."""
    conv_entries = {"kernel": "weight", "bias": "bias"}
    norm_entries = {
        **{"gamma": "weight", "beta": "bias"},
        **{"moving_mean": "running_mean", "moving_variance": "running_var"},
    }
    numbers = _vgg_numbers(names, r"block(\d)_conv(\d)/.*")
    vgg = {"fc1": "classifier.0", "fc2": "classifier.3", "predictions": "classifier.6"}

    def translate(name: str) -> str | None:
        layer, _, entry = name.removesuffix(":0").rpartition("/")
        if match := re.fullmatch(r"conv(\d)(?:_block(\d+)_(\d))?_(conv|bn)", layer):
            stage, block, conv, kind = match.groups()
            entry = (norm_entries if kind == "bn" else conv_entries).get(entry)
            block, conv = (int(block) - 1, conv) if block else (0, 1)
            return entry and _residual(stage, block, conv, kind == "bn", entry)
        module = {**numbers, **vgg}.get(layer) if numbers else {"predictions": "fc"}.get(layer)
        return _joined(module, conv_entries.get(entry))

    return translate


def _caffe(names: list[str]) -> Translator:
    """Translate a published prototxt's layer name plus blob number, as in `res4b22_branch2a/0`."""
    conv_entries = {"0": "weight", "1": "bias"}
    entries = {
        "res": conv_entries,
        "bn": {"0": "running_mean", "1": "running_var", "2": "scale_factor"},
        "scale": {"0": "weight", "1": "bias"},
    }
    numbers = _vgg_numbers(names, r"conv(\d)_(\d)/.*")
    vgg = {"fc6": "classifier.0", "fc7": "classifier.3", "fc8": "classifier.6"}

    def translate(name: str) -> str | None:
        layer, _, blob = name.rpartition("/")
        if match := re.fullmatch(r"(?:(bn|scale)_)?conv1", layer):
            kind = match[1] or "res"
            return _joined("conv1" if kind == "res" else "bn1", entries[kind].get(blob))
        # Blocks are lettered, or named a, b1, b2, ... in the deeper networks.
        if match := re.fullmatch(r"(res|bn|scale)([2-5])([a-z])(\d*)_branch(1|2[abc])", layer):
            kind, stage, letter, number, branch = match.groups()
            block = int(number) if number else ord(letter) - ord("a")
            conv = 0 if branch == "1" else "_abc".index(branch[1])
            entry = entries[kind].get(blob)
            return entry and _residual(stage, block, conv, kind != "res", entry)
        module = {**numbers, **vgg}.get(layer) if numbers else {"fc1000": "fc"}.get(layer)
        return _joined(module, conv_entries.get(blob))

    return translate


_TRANSLATORS: dict[str, Callable[[list[str]], Translator]] = {
    "caffe2": _caffe2,
    "keras": _keras,
    "caffe": _caffe,
    "timm": _timm,
    "detectron2": _detectron2,
    "torchvision": _torchvision,
}


def _joined(module: str | None, entry: str | None) -> str | None:
    return f"{module}.{entry}" if module and entry else None


def _vgg_numbers(names: list[str], pattern: str) -> dict[str, str]:
    """Map layer names of a VGG without batch norm to `features.N`; `pattern` captures block and convolution."""
    places = sorted(
        {(int(m[1]), int(m[2]), name.partition("/")[0]) for name in names if (m := re.match(pattern, name))}
    )
    # A ReLU follows every convolution, and a pooling layer precedes every block but the first.
    return {layer: f"features.{2 * i + block - 1}" for i, (block, _, layer) in enumerate(places)}


def some(names: Iterable[str], most: int = 4) -> str:
    """List the first few names, for messages."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
