"""The file that a run leaves behind, and everything shown later is read from."""

import json
from pathlib import Path
from typing import Any

from bench.environment import slug

FOLDER = Path(__file__).parent / "results"

Case = dict[str, Any]


def path_for(target: Path, environment: dict[str, Any], dtype: str) -> Path:
    """`target` itself if it names a JSON file, else `<device>-<dtype>.json` in the folder that it names."""
    return target if target.suffix == ".json" else target / f"{slug(environment['device'])}-{dtype}.json"


def merge(old: dict[str, Any], environment: dict[str, Any], cases: list[Case]) -> list[Case]:
    """The cases of an earlier run in the same environment that `cases` do not replace, and then those.

    Raises:
        ValueError: the environments differ, so that one file must not hold both.
    """
    differing = [key for key in environment if old["environment"].get(key) != environment[key]]
    if differing:
        raise ValueError(f"cannot append to results of another environment: {', '.join(differing)} changed")
    new = {_key(case) for case in cases}
    return [case for case in old["cases"] if _key(case) not in new] + cases


def write(path: Path, environment: dict[str, Any], cases: list[Case]) -> None:
    """One case per line, so that two runs can be compared by eye."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(_rounded(case)) for case in cases)
    path.write_text(f'{{"environment": {json.dumps(environment)},\n"cases": [\n{lines}\n]}}\n')


def read(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The results in `folder`, CUDA before CPU, newest kind of file first by name."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: result["environment"]["device_type"] != "cuda")


def _key(case: Case) -> tuple[str, ...]:
    return tuple(case[name] for name in ("question", "task", "label", "method", "dtype"))


def _rounded(value: Any) -> Any:
    """Four digits: no measurement has more."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
