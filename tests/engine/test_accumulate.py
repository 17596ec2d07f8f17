"""A batch in parts: the gradient of the whole, but for batch norm, which sees a part."""

import copy
from typing import NamedTuple

import pytest
import torch

from resnet_backbone.engine.trainer import seed_iteration, split
from tests.engine.tiny import assert_equal, build, build_model, in_two_processes, loss_of


class Pair(NamedTuple):
    images: torch.Tensor
    names: list[str]


class TestSplit:
    def test_one_part_is_the_batch_itself(self):
        batch = object()
        assert split(batch, 1) == [batch] and split(batch, 1)[0] is batch

    def test_a_list_of_images_as_detection_has_it(self):
        batch = [{"image": i} for i in range(6)]
        assert split(batch, 3) == [batch[:2], batch[2:4], batch[4:]]

    def test_a_tuple(self):
        images, labels = torch.arange(12).view(6, 2), torch.arange(6)
        parts = split((images, labels), 2)
        assert [type(part) for part in parts] == [tuple, tuple]
        assert_equal(parts, [(images[:3], labels[:3]), (images[3:], labels[3:])])

    def test_a_named_tuple_of_tensors_and_lists(self):
        images = torch.arange(4.0)
        parts = split(Pair(images, list("abcd")), 2)
        assert [type(part) for part in parts] == [Pair, Pair]
        assert parts[1].names == ["c", "d"] and parts[1].images.tolist() == [2.0, 3.0]


def images_of(iteration: int, rank: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * iteration + rank)
    return torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=generator)


def double_loss(model, part) -> torch.Tensor:
    """Not rounded to single precision, unlike `loss_of`."""
    return model(part[0]).square().mean()


def train(model, accumulate: int, steps: int = 3, *, rank: int = 0, hooks=(), **arguments):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    trainer = build(
        model,
        lambda model, part: ({"loss": double_loss(model, part)}, {"largest": part[0].detach().max()}),
        optimizer=optimizer,
        batches=lambda start: ((images_of(i, rank),) for i in range(start, 1000)),
        accumulate=accumulate,
        log_period=1,
        hooks=hooks,
        **arguments,
    )
    trainer.train(0, steps)
    return trainer


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_without_batch_norm_it_is_the_undivided_batch(parts):
    whole, divided = (build_model(norm=False, dropout=0.0).double() for _ in range(2))
    one, other = train(whole, 1), train(divided, parts)
    for a, b in zip(whole.parameters(), divided.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-12)
    assert other.storage.latest()["loss"][0] == pytest.approx(one.storage.latest()["loss"][0], rel=1e-6)
    initial = build_model(norm=False).double()
    assert not torch.equal(whole[0].weight, initial[0].weight)


def test_with_batch_norm_and_dropout_it_is_a_loop_over_the_parts():
    model, expected = build_model().double(), build_model().double()
    train(model, 4)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for i in range(3):
        seed_iteration(1, i, 0)
        optimizer.zero_grad()
        for part in images_of(i).split(2):
            (double_loss(expected, (part,)) / 4).backward()
        optimizer.step()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-12, msg=name)
    assert expected[1].num_batches_tracked == 12


def test_metrics_are_means_over_the_parts():
    model = build_model(norm=False, dropout=0.0).double()
    before = copy.deepcopy(model)
    stored = train(model, 4, steps=1).storage.latest()
    parts = images_of(0).split(2)
    assert stored["largest"][0] == pytest.approx(sum(part.max().item() for part in parts) / 4, rel=1e-6)
    losses = [double_loss(before, (part,)).item() for part in parts]
    assert stored["loss"][0] == stored["total_loss"][0] == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_with_a_loss_scale_it_is_torchs_own_recipe():
    def images(i):
        return images_of(i).float()

    model, expected = (build_model(norm=False, dropout=0.0) for _ in range(2))
    trainer = build(
        model,
        lambda model, part: ({"loss": loss_of(model, part[0])}, {}),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, fused=True),
        batches=lambda start: ((images(i),) for i in range(start, 1000)),
        accumulate=2,
        precision="fp16",
    )
    trainer.train(0, 6)
    optimizer, scaler = torch.optim.SGD(expected.parameters(), lr=0.05), torch.amp.GradScaler("cpu")
    for i in range(6):
        optimizer.zero_grad()
        for part in images(i).split(4):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(expected, part)
            scaler.scale(loss / 2).backward()
        scaler.step(optimizer)
        scaler.update()
    assert trainer.storage.latest()["loss_scale"][0] == scaler.get_scale()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.equal(model[0].weight, build_model(norm=False)[0].weight)


def _two() -> dict[str, torch.Tensor]:
    from resnet_backbone.engine.distributed import wrap_for_processes

    rank = torch.distributed.get_rank()
    model = build_model(norm=False, dropout=0.0).double()
    wrapped = wrap_for_processes(model)
    reductions = []
    wrapped.register_comm_hook(None, lambda state, bucket: _count(reductions, bucket))
    train(wrapped, 4, rank=rank)
    return {"reductions": torch.tensor(len(reductions)), **model.state_dict()}


def _count(reductions: list[int], bucket) -> torch.futures.Future[torch.Tensor]:
    """DistributedDataParallel's own mean over the processes, counted."""
    reductions.append(1)
    work = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def test_two_processes_exchange_gradients_once_a_step(tmp_path):
    zero, one = in_two_processes(_two, tmp_path)
    assert_equal(zero, one)
    assert zero["reductions"] == 3
    whole = build_model(norm=False, dropout=0.0).double()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for i in range(3):
        optimizer.zero_grad()
        double_loss(whole, (torch.cat([images_of(i, 0), images_of(i, 1)]),)).backward()
        optimizer.step()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(zero[name], tensor, rtol=0, atol=1e-12, msg=name)
