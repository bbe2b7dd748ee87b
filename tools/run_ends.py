"""What the ends of two training runs are compared by, bit for bit."""

import json
from pathlib import Path
from typing import Any

_OF_THE_START = ("time/", "check/")  # metrics that another start has otherwise


def end_of(run_dir: Path) -> dict[str, Any]:
    """Return what a finished run is compared by."""
    import torch

    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    best = torch.load(run_dir / "checkpoints" / "best.ckpt", weights_only=True)
    model = {path.name: path.read_bytes() for path in sorted((run_dir / "model").glob("*.safetensors"))}
    for counts in ("epoch", "loops"):
        checkpoint.pop(counts)
    return {
        "checkpoint": flat(checkpoint),
        "best": best["global_step"],
        "metrics": untimed(run_dir / "metrics.jsonl"),
        "samples": untimed(run_dir / "samples.jsonl"),
        "curves": curves(run_dir),
        "model": model,
    }


def untimed(path: Path) -> list[str]:
    """Return the lines of a log without what differs from start to start."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    kept = [{key: row[key] for key in sorted(row) if key != "time" and lasting(key)} for row in rows]
    return [json.dumps(row) for row in kept if row.keys() - {"step", "epoch"}]


def curves(run_dir: Path) -> dict[str, list[tuple[int, str]]]:
    """Return the points of TensorBoard's curves, their values as text: NaN is then equal to itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    names = sorted(name for name in events.Tags()["scalars"] if lasting(name))
    return {name: [(point.step, str(point.value)) for point in events.Scalars(name)] for name in names}


def lasting(name: str) -> bool:
    """Tell whether a metric is the same from start to start."""
    return not name.startswith(_OF_THE_START)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested containers by their paths, tensors as their bytes."""
    import torch

    if isinstance(value, dict):
        return {key: leaf for name, part in value.items() for key, leaf in flat(part, f"{path}/{name}").items()}
    if isinstance(value, list | tuple):
        return {key: leaf for place, part in enumerate(value) for key, leaf in flat(part, f"{path}/{place}").items()}
    if isinstance(value, torch.Tensor):
        return {path: (value.dtype, value.shape, value.flatten().view(torch.uint8).numpy().tobytes())}
    return {path: value}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return where two ends differ."""
    named = [name for name in expected if name != "checkpoint" and found[name] != expected[name]]
    left, right = found["checkpoint"], expected["checkpoint"]
    return named + [path for path in {**left, **right} if left.get(path, path) != right.get(path, path)]
