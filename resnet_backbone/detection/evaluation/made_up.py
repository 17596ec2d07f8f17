"""Detections made up for a dry run of an evaluator: an untrained detector finds nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances

from resnet_backbone.engine.config import ConfigError
from resnet_backbone.errors import InputError


class MadeUpDetections(DatasetEvaluator):
    """An evaluator that passes a model's outputs to another one, with one made-up detection more in each image.

    It covers the image, is of class 0, and has a mask and keypoints if the model's detections have.

    Args:
        evaluator: the evaluator to try.
        name: the data set's name, for the message.

    Raises:
        ConfigError: the evaluator fails.
    """

    def __init__(self, evaluator: DatasetEvaluator, name: str):
        self._evaluator = evaluator
        self._name = name

    def reset(self) -> None:
        self._evaluator.reset()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        outputs = [{key: _with_one_more(key, value) for key, value in output.items()} for output in outputs]
        self._tried(lambda: self._evaluator.process(inputs, outputs))

    def evaluate(self) -> dict[str, Any] | None:
        return self._tried(self._evaluator.evaluate)

    def _tried(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except InputError:
            raise
        except Exception as error:
            raise ConfigError(
                f"the evaluation on {self._name} fails on a detection made up to try it ({type(error).__name__}: "
                f"{' '.join(str(error).split())}). Correct the data set's ground truth or its evaluator, or leave "
                "DATASETS.TEST empty to train without evaluation."
            ) from error


def _with_one_more(key: str, found: Any) -> Any:
    if key not in ("instances", "proposals"):
        return found
    height, width = found.image_size
    one = Instances(found.image_size)
    for name, values in found.get_fields().items():
        if isinstance(values, Boxes):
            one.set(name, Boxes(values.tensor.new_tensor([[0, 0, width, height]])))
        else:
            fill = 0 if name == "pred_classes" else 1
            one.set(name, values.new_full((1, *values.shape[1:]), fill))
    return Instances.cat([found, one])
