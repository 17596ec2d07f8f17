from collections import Counter

import numpy as np

from benchmarks.evaluate import (
    COUNTING,
    MEANING,
    OURS,
    REFERENCE,
    STOCK,
    EvaluationWork,
    compare_evaluation,
    made_up_detections,
    made_up_truth,
)

WORK = EvaluationWork(images=12, detections=9, categories=80, rounds=2, cpu_time=False)


def test_both_ways_are_timed_as_a_whole_and_alone():
    lines = []
    whole, counting = compare_evaluation(WORK, lines.append)
    assert lines == ["evaluating 12×9 detections", "counting 12×9 detections"]
    assert list(whole.sides) == [OURS, STOCK] and list(counting.sides) == [COUNTING, REFERENCE]
    for comparison in (whole, counting):
        assert comparison.work == 12 and comparison.unit == "images/s"
        assert all(len(rates) == 2 and min(rates) > 0 for rates in comparison.rates.values())
    assert set(MEANING) == {*whole.sides, *counting.sides}


def test_the_data_are_as_many_as_cocos():
    work = EvaluationWork(images=400, detections=50, categories=80, rounds=1, cpu_time=False)
    truth = made_up_truth(work)
    objects = Counter(item["image_id"] for item in truth["annotations"])
    assert abs(np.mean([objects[image["id"]] for image in truth["images"]]) - 7.3) < 0.5
    for output in made_up_detections(truth, work)[:5]:
        found = output["instances"]
        assert len(found) == 50 and found.scores.diff().max() <= 0
        assert found.pred_classes.min() >= 0 and found.pred_classes.max() < 80
