import json

from detectron2 import model_zoo
from detectron2.config import get_cfg

from resnet_backbone.detection import add_network_config, get_config
from resnet_backbone.engine.describe import flat_config


def test_added_keys_leave_a_stock_configuration_as_it_is():
    ours, stock = get_config(), get_cfg()
    file = model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")
    ours.merge_from_file(file)
    stock.merge_from_file(file)
    assert flat_config(stock).items() < flat_config(ours).items()


def test_a_dumped_configuration_merges_into_a_users_own(tmp_path):
    cfg = get_config()
    cfg.MODEL.NETWORK.NAME = "vgg16"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    own = get_cfg()
    add_network_config(own)
    own.merge_from_file(str(tmp_path / "config.yaml"))
    # Lists and tuples alike, as YAML has them.
    assert json.loads(json.dumps(own)) == json.loads(json.dumps(cfg))
