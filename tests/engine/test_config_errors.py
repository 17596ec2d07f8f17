import pytest

from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.config_errors import as_config_error
from resnet_backbone.errors import InputError


@pytest.mark.parametrize("kind", [ValueError, InputError])
def test_the_keys_are_named_before_the_complaint(kind):
    complaint = "a crop of 0x3 pixels is empty"
    with pytest.raises(ConfigError, match=rf"^INPUT\.CROP: {complaint}\.$"), as_config_error("INPUT.CROP"):
        raise kind(complaint)


def test_what_names_its_keys_already_or_is_no_bad_value_stays():
    for error in (ConfigError("SEED is -1."), TypeError("a bug")):
        with pytest.raises(type(error)) as caught, as_config_error("INPUT"):
            raise error
        assert caught.value is error
