"""The layer that a bad value first appears in is named, and the model left as it was."""

import copy
import math

import pytest
import torch
from torch import nn

from resnet_backbone.engine.nonfinite import find_cause
from resnet_backbone.networks import build_network
from tests.engine.tiny import assert_equal, build, build_model, loss_of


def images(*values: float) -> torch.Tensor:
    """(4, 3, 6, 6), normally distributed but for the first values of the second image."""
    batch = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    batch[1, 0, 0, : len(values)] = torch.tensor(values)
    return batch


def cause(model: nn.Module, batch: torch.Tensor, loss=loss_of) -> str:
    return find_cause(model, [batch], lambda part: {"loss_cls": loss(model, part)})


class Logarithm(nn.Module):
    """Minus infinity at 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.log()


class Root(nn.Module):
    """0 at 0, where its gradient is infinite."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sqrt()


def test_a_layer_that_cannot_take_a_certain_value():
    """The ReLU gives zeros, of which the logarithm is infinite."""
    model = nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)), "log": Logarithm()})
    model.forward = lambda x: model.log(model.body(x))
    assert cause(model, images()) == "the output of log"


def test_a_bad_pixel_is_the_first_layers_input():
    assert cause(build_model(), images(math.nan)) == "the input of 0"


def test_an_overflow_in_the_middle():
    model = build_model()
    model[1].weight.data[2] = 3e38
    assert cause(model, images()) == "the output of 1"


def test_the_loss_alone():
    found = cause(build_model(), images(), lambda model, x: loss_of(model, x) / 0)
    assert found == "the loss loss_cls (all layers' outputs are finite)"


def test_a_gradient_alone():
    """The root's own input has the infinite gradient: that is the output of the layer before."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Root())
    assert cause(model, images(), lambda model, x: model(x).sum()) == "the gradient of the output of 1"


def test_a_parameters_gradient_alone():
    model = build_model()
    model.register_parameter("scale", nn.Parameter(torch.zeros(())))
    found = cause(model, images(), lambda model, x: loss_of(model, x) + model.scale.abs().sqrt() * 1e-3)
    assert found == "the gradient of scale"


def test_a_norm_that_overflows():
    model = nn.Sequential(nn.Linear(2, 2))
    found = find_cause(model, [torch.ones(1, 2)], lambda x: {"loss": model(x).sum() * 1e30})
    assert found == "the norm of the gradient, each value of which is finite"


def test_nothing():
    assert cause(build_model(), images()).startswith("nothing in a second run of the same batch")


def test_gradients_that_were_there_are_not_taken_for_those_of_the_batch():
    """After a bad step, the model still has its gradients, while the second run may be fine."""
    model = build_model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    assert cause(model, images()).startswith("nothing")


def test_only_the_second_part_of_a_batch_is_bad():
    model = build_model()
    parts = [images(), images(math.inf)]
    assert find_cause(model, parts, lambda part: {"loss": loss_of(model, part)}) == "the input of 0"


def test_detectron2s_refusal_of_boxes():
    model = build_model()

    def losses(part):
        model(part)
        raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")

    assert find_cause(model, [images(math.nan)], losses) == "the input of 0"
    found = find_cause(model, [images()], losses)
    assert "Predicted boxes or scores contain Inf/NaN" in found and "all of them finite" in found


@pytest.mark.parametrize("batch", [images(), images(math.nan)], ids=["good", "bad"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(batch, training):
    model = build_model().train(training)
    loss_of(model, images()).backward()
    model[0].bias.grad = None
    before = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    mode = [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    cause(model, batch)
    assert_equal(model.state_dict(), before)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert [module.training for module in model.modules()] == mode
    assert [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()] == hooks


class TestOurNetwork:
    def network(self) -> nn.Module:
        """With in-place ReLUs, one weight of which is infinite."""
        torch.manual_seed(0)
        model = build_network("cifar_resnet20", 10, width=0.5)
        model.layer2[0].conv1.weight.data[0, 0, 0, 0] = math.inf
        return model

    def test_a_poisoned_weight(self):
        model = self.network()
        batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        assert cause(model, batch) == "the output of layer2.0.conv1"

    @pytest.mark.parametrize("backend", ["eager", None])
    def test_compiled(self, backend):
        """A compiled network is run as it is written, so that its layers can be looked at."""
        model = self.network()
        if backend is not None:
            model.compile(backend=backend)
        batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        model(batch)  # compiled before the hooks are there
        trainer = build(
            model,
            lambda model, i: ({"loss": model(batch).square().mean()}, {}),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1, fused=True),
        )
        with pytest.raises(FloatingPointError, match=r"It appeared first in the output of layer2\.0\.conv1\."):
            trainer.train(0, 3)
