"""Made-up records of runs on CIFAR-10, and a look into a report."""

import json
from pathlib import Path


def made_record(network: str, seed: int = 1, **entries) -> dict:
    """A made-up record of the paper's schedule."""
    settings = {
        "training_images": 50_000,
        "test_images": 10_000,
        "width": 1.0,
        "batch": 128,
        "learning_rate": 0.1,
        "steps": [32_000, 48_000],
        "iterations": 64_000,
        "warm_up_until_error": 0.0,
        "weight_decay": 1e-4,
        "precision": "fp32",
    }
    record = {
        "network": network,
        "seed": seed,
        "scale": "paper",
        "title": "CIFAR-10",
        "training_error": 1.0,
        "training_error_of_final_weights": 0.5,
        "test_error": 8.0,
        "settings": {**settings, **entries.pop("settings", {})},
        "keys": [],
        "versions": "Python 3.11.7, torch 2.11.0",
        "machine": "a machine",
        "parallel": 1,
        "seconds": 100,
        "resumed": False,
        "training_curve": [[2000, 30.0], [4000, 20.0]],
        "test_curve": [[2000, 35.0], [4000, 25.0]],
    }
    return {**record, **entries}


def write_records(output: Path, *records: dict) -> Path:
    for record in records:
        file = output / "runs" / f"{record['network']}-{record['seed']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record))
    return output


def table_row(report: str, network: str) -> list[str]:
    line = next(line for line in report.splitlines() if line.startswith(f"| {network} "))
    return [cell.strip() for cell in line.strip("|").split("|")]
