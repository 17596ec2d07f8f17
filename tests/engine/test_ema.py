"""The moving average, against torch's."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnet_backbone.engine.ema import MovingAverage
from tests.engine.tiny import IMAGES, build, build_model, loss_of


def steps(model, count: int, *averages) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for i in range(count):
        optimizer.zero_grad()
        loss_of(model, IMAGES[4 * i : 4 * i + 4]).backward()
        optimizer.step()
        for update in averages:
            update()


def assert_close(model, expected) -> None:
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_as_torchs(decay):
    model = build_model()
    ours = MovingAverage(model, decay)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    steps(model, 6, ours.update, lambda: theirs.update_parameters(model))
    assert_close(ours.model, theirs.module.state_dict())
    assert torch.equal(ours.model[0].weight, model[0].weight) == (decay == 0.0)


def test_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    average = MovingAverage(model, 0.75)
    expected = None
    for value in (4.0, 8.0, -2.0, 1.0):
        torch.nn.init.constant_(model.weight, value)
        average.update()
        expected = value if expected is None else 0.75 * expected + 0.25 * value
    assert average.model.weight.item() == expected


def test_a_copy_with_no_ties_to_the_model():
    model = build_model()
    average = MovingAverage(model, 0.9)
    before = copy.deepcopy(average.model.state_dict())
    steps(model, 2)
    for name, tensor in average.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(p.requires_grad for p in average.model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_counters_are_the_models():
    model = build_model()
    average = MovingAverage(model, 0.9)
    steps(model, 3, average.update)
    assert average.model[1].num_batches_tracked == 3 == model[1].num_batches_tracked
    assert average.state_dict()["1.num_batches_tracked"] == 3


def test_a_restored_average_goes_on_as_if_nothing_had_been():
    model = build_model()
    average = MovingAverage(model, 0.9)
    steps(model, 3, average.update)
    restored = MovingAverage(model, 0.9)
    restored.load_state_dict({name: tensor.clone() for name, tensor in average.state_dict().items()})
    steps(model, 3, average.update, restored.update)
    for name, tensor in average.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name


def test_the_trainer_updates_it_after_each_step():
    model = build_model()
    average = MovingAverage(model, 0.8)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = build(model, lambda m, i: ({"loss": loss_of(m, IMAGES[i : i + 4])}, {}), optimizer=optimizer)
    trainer.average = average
    after_step = trainer.after_step
    trainer.after_step = lambda: (theirs.update_parameters(model), after_step())
    trainer.train(0, 6)
    assert_close(average.model, theirs.module.state_dict())
    assert trainer.state_dict()["average"].keys() == model.state_dict().keys()


def test_a_run_that_is_resumed_with_an_average_begins_it_at_the_weights():
    """The checkpoint is of a run without one."""
    model = build_model()
    state = build(model).state_dict()
    steps(model, 2)
    average = MovingAverage(build_model(), 0.9)
    trainer = build(model, average=average)
    trainer.load_state_dict(state)
    assert torch.equal(average.model[0].weight, model[0].weight)
    assert not torch.equal(model[0].weight, build_model()[0].weight)
