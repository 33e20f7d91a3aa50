"""`bench.run_on_gpu`: steps that fail, hang or come too late do not stop the rest; what it sums up in the end."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import run_on_gpu
from bench.measure import models, replay
from bench.measure.harness import Harness
from bench.report import results, verdict
from bench.run_on_gpu import Step
from bench.static import codegen
from tests.support import small_sweep

FACTS = {"device": "Imaginary", "device_type": "cpu"}
# Starts a child that would outlive it and does not heed an interrupt, says which, and waits.
CHILD = ["sh", "-c", "trap '' INT; exec sleep 60"]
HANGS = f"import subprocess, time; print(subprocess.Popen({CHILD!r}).pid, flush=True); time.sleep(60)"


def test_a_failing_or_hanging_step_does_not_stop_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    todo = [
        Step("fails", 10, ["-c", "print('first'); raise SystemExit(3)"]),
        Step("hangs", 0.2, ["-c", HANGS]),
        Step("needs", 1, ["no-such-program"], program="no-such-program"),
        Step("passes", 3, ["-c", "import bench.static.ledger, os; print('done', os.environ['LEVEL'])"], {"LEVEL": "2"}),
    ]
    found = run_on_gpu.run_all(todo, 1, tmp_path, FACTS)
    assert [each["outcome"] for each in found] == [
        *("failed: exit status 3", found[1]["outcome"], "skipped: no-such-program is not installed", "passed")
    ]
    assert found[1]["outcome"].startswith("failed: stopped after ")
    assert found[0]["tail"] == ["first"]
    assert found[3]["tail"] == ["done 2"]
    child = int(found[1]["tail"][0])
    until = time.monotonic() + 5
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < until, "the child of a stopped step goes on"
        time.sleep(0.05)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored == {"environment": FACTS, "steps": found}
    assert "passes: passed, " in capsys.readouterr().out
    assert (tmp_path / "run" / "fails.log").read_text() == "first\n"


def test_steps_after_the_deadline_are_left_out(tmp_path: Path) -> None:
    sleeps = ["-c", "import time; time.sleep(30)"]
    first, second = run_on_gpu.run_all([Step("long", 1e9, sleeps), Step("late", 1e-9, sleeps)], 1 / 60, tmp_path, FACTS)
    assert first["outcome"] == "failed: stopped after 1 s"
    assert second["outcome"] == "skipped: out of time"


def test_a_step_gets_its_share_of_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, limits = [0.0], []

    def run_step(step: Step, limit: float, logs: Path) -> dict[str, Any]:
        limits.append(limit)
        now[0] += limit / 2
        return {"step": step.name, "outcome": "passed", "seconds": 0.0, "tail": []}

    monkeypatch.setattr(run_on_gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_on_gpu, "run_step", run_step)
    run_on_gpu.run_all([Step("a", 2, []), Step("b", 1, []), Step("c", 1, [])], 1, tmp_path, FACTS)
    assert limits == [30.0, 22.5, 33.75]


def test_a_step_is_told_of_its_time(tmp_path: Path) -> None:
    found = run_on_gpu.run_step(Step("told", 1, ["-c", "import sys; print(sys.argv[1:])"], told=0.5), 60, tmp_path)
    assert found["tail"] == ["['--seconds', '30']"]


def test_failures_are_reported_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = [Step("bad", 60, ["-c", "print('why'); raise SystemExit(1)"]), Step("good", 60, ["-c", ""])]
    monkeypatch.setattr(run_on_gpu, "steps", lambda *arguments: todo)
    assert run_on_gpu.main(["--device", "cpu", "--results", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert text.endswith("=== bad: failed: exit status 1\nwhy\n\nbad: failed: exit status 1\ngood: passed\n")
    monkeypatch.setattr(run_on_gpu, "steps", lambda *arguments: todo[1:])
    assert run_on_gpu.main(["--device", "cpu", "--results", str(tmp_path)]) == 0
    assert run_on_gpu.main(["--device", "cpu", "--minutes", "0", "--results", str(tmp_path)]) == 1  # nothing ran


def test_steps_name_what_exists() -> None:
    for device, small in (("cuda", False), ("cpu", True)):
        todo = run_on_gpu.steps(device, small, Path("results"))
        assert len({step.name for step in todo}) == len(todo)
        for step in todo:
            module = step.command[step.command.index("-m") + 1]
            assert module == "pytest" or (results.ROOT / f"{module.replace('.', '/')}.py").exists()
    assert all(
        (step.program == "compute-sanitizer") == ("check" in step.name)
        for step in run_on_gpu.steps("cuda", False, Path())
    )


def case(task: str, label: str, method: str, ratio: float, n: int = 30_000_000, share: float = 0.95) -> dict[str, Any]:
    found = {"question": task, "task": task, "label": label, "method": method, "dtype": "float32", "n_weights": n}
    return {**found, "status": "measured", "ratio": {"p50": ratio}, "share_of_copy": share}


def test_the_summary_finds_the_worst_and_what_was_missed(tmp_path: Path) -> None:
    cases = [
        *(case("backward", "a", "fastreg", 2.0), case("backward", "a", "foreach", 8.0)),
        *(case("backward", "a", "loop", 5.0), case("backward", "a", "foreach compiled", 1.9)),
        *(case("backward", "b", "fastreg", 3.0), case("backward", "b", "foreach", 9.0)),
        *(case("value", "a", "fastreg", 1.1, share=0.89), case("value", "small", "fastreg", 1.0, n=1000, share=0.1)),
        {**case("prox", "a", "fastreg", 1.0), "status": "failed", "reason": "wrong by 1"},
        {**case("value", "1000", "fastreg", 99.0), "question": "size"},
    ]
    rows = [line.split(" | ") for line in verdict.worst(cases)[2:]]
    assert rows == [
        ["| backward", "3.00 (b)", "0.40 (a)", "1.05 (a)", "0.95 (a) |"],
        ["| value", "1.10 (a)", "-", "-", "0.10 (small) |"],
    ]
    assert verdict.missed(cases) == [
        "- missed: backward, a: 0.40 of the best eager peer's time, not a third",
        "- missed: backward, a: 1.05 of the best compiled peer's time, not at most 1",
        "- missed: value, a: 89% of copy bandwidth, not 90%",
        "- wrong: prox, a, fastreg: wrong by 1",
    ]
    assert verdict.missed(cases[4:6]) == ["No bar was missed by what was measured, on 1 models."]
    facts = results.environment(torch.device("cpu"))
    results.write(tmp_path / "some.json", facts, cases)
    results.write(tmp_path / "host.json", facts, [{**cases[0], "question": "host"}])
    assert sum("worst of" in line for line in verdict.summary(tmp_path, facts)) == 1
    nothing = ["This run has measured nothing.", ""]
    assert verdict.summary(tmp_path, {**facts, "commit": "another"}) == nothing
    assert verdict.summary(tmp_path, facts, since=time.time() + 60) == nothing
    (tmp_path / "cut.json").write_text((tmp_path / "some.json").read_text()[:100])
    (tmp_path / "other.json").write_text("[]")
    assert sum("worst of" in line for line in verdict.summary(tmp_path, facts)) == 1


def test_replays_are_compared_with_what_was_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harness = Harness(torch.device("cpu"), torch.float32)
    harness.copy_bandwidth = lambda: 1e9  # type: ignore[method-assign]
    cases = replay.measure("mnist_mlp", harness, rounds=1)
    assert [(c["task"], c["method"]) for c in cases] == [
        (task, f"fastreg {how}") for task in ("value", "add_grad", "prox") for how in ("called", "replayed")
    ]
    n = cases[0]["n_weights"]
    for c in cases:
        passes = {"value": 1, "add_grad": 3, "prox": 2}[c["task"]]
        assert 4e-9 * passes * n <= c["predicted_seconds"] <= 4e-9 * passes * n * 1.05
        assert c["of_predicted"] == pytest.approx(c["seconds"]["p50"] / c["predicted_seconds"])


def test_replays_are_not_timed_on_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proximal step a round would make all weights zero, which a GPU is faster with."""
    weights = models.from_shapes([[300, 20]], torch.float32, "cpu")
    monkeypatch.setattr(replay, "from_shapes", lambda *arguments: weights)
    harness, zeros = Harness(torch.device("cpu"), torch.float32), []

    def seconds(call: Any) -> float:
        zeros.append(int((weights[0] == 0).sum()))
        call()
        return 1.0

    harness.copy_bandwidth = lambda: 1e9  # type: ignore[method-assign]
    harness.seconds = seconds  # type: ignore[method-assign]
    replay.measure("mnist_mlp", harness, rounds=3)
    assert zeros == [0] * len(zeros)


@pytest.mark.codegen
def test_predictions_know_the_gpu() -> None:
    assert replay.share_of_bandwidth("NVIDIA H100 80GB HBM3", "value", "float32") == 1.0
    assert replay.share_of_bandwidth("NVIDIA RTX 4090", "prox", "bfloat16") == 1.0
    assert replay.share_of_bandwidth("NVIDIA L40", "prox", "bfloat16") == 1.0  # not in the table
    if codegen.is_known("sm_103"):
        assert replay.share_of_bandwidth("NVIDIA B300 SXM6 AC", "value", "bfloat16") < 1.0
    weights = [torch.empty(1000, device="meta")]
    assert replay.predicted_seconds("prox", weights, 1e9, 0.5) == 2 * replay.predicted_seconds("prox", weights, 1e9)


def test_the_sweep_for_sanitizers_runs_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    small_sweep.main(["--device", "cpu"])
    assert float(capsys.readouterr().out) > 1e48  # squares of 1e25


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="2"):
        run_on_gpu.main([])
    assert "there is no CUDA device here" in capsys.readouterr().err
