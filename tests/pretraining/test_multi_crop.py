import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional as reference

from resnet_backbone import build_network
from resnet_backbone.data.functional import resize
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.errors import InputError
from resnet_backbone.pretraining.multi_crop import (
    CropGroup,
    TenCrops,
    WholeImages,
    build_evaluation_crops,
    collate,
    log_probabilities,
)


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth noise, `(height, width, 3)` uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


def prepare(images: torch.Tensor) -> torch.Tensor:
    return (images.double() - 118) / 57


def small_network(name: str, **arguments) -> nn.Module:
    torch.manual_seed(5)
    return build_network(name, 6, width=0.125, **arguments).double().eval()


def opinionated(name: str, images: list[np.ndarray]) -> nn.Module:
    """A network whose logits have mean 0 and standard deviation 2 over `images`."""
    network = small_network(name)
    with torch.no_grad():
        logits = torch.cat([network(prepare(torch.from_numpy(image).permute(2, 0, 1)[None])) for image in images])
        scale = 2 / logits.std(0)
        network.fc.weight *= scale[:, None]
        network.fc.bias.copy_(-logits.mean(0) * scale)
    return network


class TestTenCrops:
    @pytest.mark.parametrize(
        ("height", "width", "crop"), [(40, 57, (32, 32)), (40, 40, (40, 40)), (61, 40, (31, 24)), (43, 40, (33, 40))]
    )
    def test_the_ten_are_torchvisions(self, height, width, crop):
        image = photograph(height, width)  # its shorter side is as wished, so that nothing is resized
        found = TenCrops(short_side=40, crop=crop, channel_order="RGB")(image)
        expected = reference.ten_crop(Image.fromarray(image), list(crop))
        assert len(found) == len(expected) == 10
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, reference.pil_to_tensor(other))

    def test_the_shorter_side_is_resized_first_and_channels_ordered(self):
        image = photograph(90, 60)
        bgr = TenCrops(short_side=40, crop=(36, 36), channel_order="BGR")(image)
        resized = reference.resize(Image.fromarray(image), 40)
        for one, other in zip(bgr, reference.ten_crop(resized, 36), strict=True):
            assert (one.flip(0).int() - reference.pil_to_tensor(other).int()).abs().max() <= 1

    def test_prediction_is_the_mean_of_torchvisions_ten_softmaxes(self):
        images = [photograph(40, 51, seed=1), photograph(64, 40, seed=2), photograph(40, 40, seed=3)]
        network = opinionated("resnet18", images)
        transform = TenCrops(short_side=40, crop=(33, 33), channel_order="RGB")
        groups, labels = collate([(transform(image), label) for label, image in enumerate(images)])
        assert labels.tolist() == [0, 1, 2]
        expected = torch.stack(
            [
                torch.stack(
                    [network(prepare(reference.pil_to_tensor(crop)[None])).softmax(1)[0] for crop in crops]
                ).mean(0)
                for crops in (reference.ten_crop(Image.fromarray(image), [33, 33]) for image in images)
            ]
        )
        assert expected.std(0).max() > 0.1
        for limit in (None, 33 * 33 * 4, 1):
            found = log_probabilities(network, prepare, groups, 3, max_pixels=limit)
            assert found.dtype == torch.float64
            torch.testing.assert_close(found.exp(), expected, rtol=0, atol=1e-9)

    def test_probabilities_too_small_for_a_number_still_rank(self):
        scores = torch.tensor([[4000.0, 1.0, 0.0, 3000.0, 2.0]])
        network = nn.Linear(1, 1)  # for its device
        network.forward = lambda images: scores.expand(len(images), -1)
        found = log_probabilities(network, prepare, [CropGroup(torch.zeros(1, 3, 2, 2), torch.tensor([0]))], 1)
        assert found.exp()[0, 1:].sum() == 0
        assert found[0].argsort(descending=True).tolist() == [0, 3, 4, 1, 2]


class TestScales:
    def test_the_whole_image_at_every_shorter_side(self):
        image = photograph(60, 90)
        crops = WholeImages(scales=(30, 45, 100), channel_order="RGB")(image)
        assert [tuple(crop.shape) for crop in crops] == [(3, 30, 45), (3, 45, 67), (3, 100, 150)]
        for crop, side in zip(crops, (30, 45, 100), strict=True):
            expected = reference.pil_to_tensor(reference.resize(Image.fromarray(image), side))
            assert crop.shape == expected.shape and (crop.int() - expected.int()).abs().max() <= 1

    @pytest.mark.parametrize("name", ["resnet18", "preact_resnet50"])
    def test_prediction_is_the_mean_over_scales_and_mirror_images_one_by_one(self, name):
        sizes = [(40, 60), (60, 40), (40, 60), (50, 50), (80, 120)]
        images = [photograph(*size, seed=seed) for seed, size in enumerate(sizes)]
        network = opinionated(name, images)
        transform = WholeImages(scales=(32, 40, 56), channel_order="RGB")
        groups, _ = collate([(transform(image), 0) for image in images])
        # 40×60 and 80×120 are of one shape: three shapes at every scale, and no image twice in a group.
        assert len(groups) == 9
        assert all(len(group.image_indices.unique()) == len(group.image_indices) for group in groups)
        expected = []
        for image in images:
            crops = [torch.from_numpy(resize(image, crop.shape[1:])).permute(2, 0, 1) for crop in transform(image)]
            crops += [crop.flip(-1) for crop in crops]
            # The network as it classifies: global average pooling, then the fully connected layer.
            expected.append(torch.cat([network(prepare(crop[None])).softmax(1) for crop in crops]).mean(0))
        expected = torch.stack(expected)
        assert expected.std(0).max() > 0.1
        for limit in (None, 5000, 1):
            found = log_probabilities(network, prepare, groups, 5, dense=True, max_pixels=limit)
            torch.testing.assert_close(found.exp(), expected, rtol=0, atol=1e-9)

    def test_the_network_never_sees_more_pixels_at_once_than_allowed(self):
        network = small_network("resnet18")
        seen = []
        transform = WholeImages(scales=(32, 64), channel_order="RGB")
        groups, _ = collate([(transform(photograph(40, 60, seed=seed)), 0) for seed in range(7)])

        def watch(images):
            seen.append(images.shape[0] * images.shape[2] * images.shape[3])
            return prepare(images)

        log_probabilities(network, watch, groups, 7, dense=True, max_pixels=4 * 32 * 48)
        assert seen == [4 * 32 * 48] * 3 + [2 * 32 * 48] + [2 * 64 * 96] * 7


class TestDenseLogits:
    def test_a_resnets_mean_over_positions_is_its_logits(self):
        network = small_network("resnet18")
        images = torch.randn(2, 3, 70, 101, dtype=torch.float64)
        dense = network.dense_logits(images)
        assert dense.shape == (2, 6, 3, 4)
        torch.testing.assert_close(dense.mean((2, 3)), network(images), rtol=0, atol=1e-12)
        # A position's logits are the classifier's of that position's feature.
        feature = network.forward_features(images, ["res5"])["res5"][1, :, 2, 1]
        torch.testing.assert_close(dense[1, :, 2, 1], network.fc(feature), rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        ("arguments", "plain", "larger", "last"),
        [
            (("vgg16", {}), (224, 224), (256, 256), "pool5"),
            (("vgg16_bn", {"pool5": False}), (112, 112), (128, 145), "conv5"),
        ],
    )
    def test_vggs_are_the_classifier_on_every_7x7_window(self, arguments, plain, larger, last):
        name, options = arguments
        network = small_network(name, **options)
        assert network.classifier.get_submodule("2").p > 0  # dropout, which must be off
        with torch.no_grad():
            images = torch.randn(1, 3, *plain, dtype=torch.float64)
            dense = network.dense_logits(images)
            assert dense.shape == (1, 6, 1, 1)
            torch.testing.assert_close(dense.flatten(1), network(images), rtol=0, atol=1e-12)

            images = torch.randn(2, 3, *larger, dtype=torch.float64)
            features = network.forward_features(images, [last])[last]
            dense = network.dense_logits(images)
            rows, columns = features.shape[2] - 6, features.shape[3] - 6
            assert rows == 2 and columns >= 2 and dense.shape == (2, 6, rows, columns)
            assert dense.std((2, 3)).max() > 1e-4
            for row in range(rows):
                for column in range(columns):
                    window = features[:, :, row : row + 7, column : column + 7]
                    expected = network.classifier(window.flatten(1))
                    torch.testing.assert_close(dense[:, :, row, column], expected, rtol=0, atol=1e-12)

    def test_vggs_parameters_are_not_touched(self):
        network = small_network("vgg16", pool5=False)
        before = copy.deepcopy(network.state_dict())
        network.dense_logits(torch.randn(1, 3, 128, 112, dtype=torch.float64))
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, before[key]) and tensor.shape == before[key].shape

    @pytest.mark.parametrize(("pool5", "least"), [(True, 224), (False, 112)])
    def test_vggs_smallest_image(self, pool5, least):
        network = small_network("vgg16", pool5=pool5)
        with torch.no_grad(), pytest.raises(InputError, match=f"6×7; .* at least {least} pixels"):
            network.dense_logits(torch.zeros(1, 3, least - 1, least, dtype=torch.float64))


class TestCollate:
    def test_single_crops_and_further_columns(self):
        images = torch.arange(48, dtype=torch.uint8).view(4, 3, 2, 2)
        (group,), labels = collate([(image, label, "more") for image, label in zip(images, (3, 1, 2, 0), strict=True)])
        assert torch.equal(group.pixels, images) and group.image_indices.tolist() == [0, 1, 2, 3]
        assert labels.dtype == torch.int64 and labels.tolist() == [3, 1, 2, 0]

    def test_every_crop_is_in_one_group_of_its_shape(self):
        samples = [([torch.full((3, side, 5), 10 * i + j) for j, side in enumerate((2, 2, 4))], i) for i in range(3)]
        groups, _ = collate(samples)
        assert [tuple(group.pixels.shape) for group in groups] == [(3, 3, 2, 5), (3, 3, 2, 5), (3, 3, 4, 5)]
        for number, group in enumerate(groups):
            assert group.pixels[:, 0, 0, 0].tolist() == [number, 10 + number, 20 + number]


class TestChoice:
    @pytest.mark.parametrize(
        ("overrides", "count", "dense", "words"),
        [
            ((), 1, False, "1 crop"),
            (("TEST.CROPS", 10), 10, False, "10 crops"),
            (("TEST.SCALES", (30, 40)), 2, True, "scales 30, 40, mirrored too"),
            (("TEST.SCALES", 30), 1, True, "scales 30, mirrored too"),
        ],
    )
    def test_of_the_configuration(self, pretrain_config, tmp_path, overrides, count, dense, words):
        crops = build_evaluation_crops(pretrain_config(tmp_path, "INPUT.MIN_SIZE_TEST", 36, *overrides))
        assert (crops.dense, crops.description) == (dense, words)
        found = crops.transform(photograph(50, 50))
        found = [found] if isinstance(found, torch.Tensor) else found
        assert len(found) == count
        total = sum(crop.shape[1] * crop.shape[2] for crop in found)
        assert total <= crops.pixels <= math.ceil(4 / 3 * total)

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (("TEST.CROPS", 10, "TEST.SCALES", (224, 256)), r"TEST.CROPS is 10 and TEST.SCALES \(224, 256\)"),
            (("TEST.SCALES", (224, 0)), r"TEST.SCALES: .*\(224, 0\)"),
            (("TEST.SCALES", (224.5,)), r"TEST.SCALES: .*\(224.5,\)"),
            (("TEST.CROPS", 10, "INPUT.CROP.SIZE", (64, 64)), "INPUT.CROP.SIZE, INPUT.MIN_SIZE_TEST: .*64x64"),
        ],
    )
    def test_what_cannot_be_used(self, pretrain_config, tmp_path, overrides, words):
        with pytest.raises(ConfigError, match=words):
            build_evaluation_crops(pretrain_config(tmp_path, *overrides))
