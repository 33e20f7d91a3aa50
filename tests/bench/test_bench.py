"""The benchmarks' own arithmetic: what is counted, what is refused, what is shown."""

import functools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import matplotlib.figure
import pytest
import torch
from torch import nn

import fastreg
from bench.conftest import Session
from bench.measure import host, internals, tune
from bench.measure.harness import LEAST_ROUNDS, Harness, launches, peak_extra_bytes, quantiles
from bench.measure.models import MODELS, SHAPES, from_shapes, n_weights
from bench.measure.peers import L1, L2, PEERS, Found, check, methods, prepare, zero_grads
from bench.report import pages as report
from bench.report import results
from bench.static import ledger
from bench.static.ledger import count, multi_tensor_launches
from fastreg.blocks import plan
from fastreg.core import layout

CPU = torch.device("cpu")
# The table of the design: passes over the weights, and launches, for one dtype on one device.
FASTREG = {"value": (1, 2), "backward": (4, 4), "add_grad": (3, 2), "prox": (2, 1)}


def small_model(device: str = "cpu") -> list[nn.Parameter]:
    return from_shapes([[300, 200], [200], [50, 300], [50]], torch.float32, device)


def passes(operations: list[Any], weights: list[nn.Parameter]) -> float:
    return sum(o.read + o.written for o in operations) / sum(w.numel() * w.element_size() for w in weights)


def test_cat_reads_and_writes_the_model_once() -> None:
    weights = small_model("meta")
    (operation,) = count(lambda: torch.cat([w.detach().view(-1) for w in weights]))
    n_bytes = 4 * sum(w.numel() for w in weights)
    assert operation == ("cat", 1, n_bytes, n_bytes)


def test_in_place_operands_count_twice_views_and_expansions_not_at_all() -> None:
    a, b = torch.zeros(10, 10), torch.ones(10)
    operations = count(lambda: a.t().add_(b.expand(10, 10)))
    assert operations == [("add_", 1, 400 + 40, 400)]
    assert count(lambda: a.copy_(a.clone())) == [("clone", 1, 400, 400), ("copy_", 1, 400, 400)]
    assert count(lambda: a.zero_()) == [("zero_", 1, 0, 400)]
    assert count(lambda: torch._foreach_add_([a, a], [a, a])) == [("_foreach_add_", 1, 1600, 800)]


def test_multi_tensor_launches_follow_the_limits() -> None:
    small, large = torch.empty(10, device="meta"), torch.empty(65536 * 321, device="meta")
    assert multi_tensor_launches([small] * 110, 1) == 1
    assert multi_tensor_launches([small] * 111, 1) == 2
    assert multi_tensor_launches([small] * 65, 2) == 2
    assert multi_tensor_launches([large], 1) == 2


@pytest.mark.parametrize(("method", "expected"), [("torch.cat", 24.0), ("foreach", 14.0)])
def test_rivals_backward_moves_what_theory_says(method: str, expected: float) -> None:
    weights = small_model("meta")
    assert ledger.row("small", "backward", method, weights).passes == pytest.approx(expected, rel=2e-3)


def test_counts_do_not_depend_on_whether_there_is_data() -> None:
    rows = [[ledger.row("small", "backward", m, small_model(device)) for m in PEERS] for device in ("cpu", "meta")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("task", FASTREG)
def test_fastreg_is_what_the_design_says(task: str) -> None:
    weights = from_shapes([[1000, 1000]] * 20, torch.bfloat16, "meta")
    found = ledger.row("large", task, "fastreg", weights)
    expected_passes, expected_launches = FASTREG[task]
    assert found.passes == pytest.approx(expected_passes, rel=0.02)  # the tables are the rest
    assert found.launches == expected_launches


@pytest.mark.parametrize("task", FASTREG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager_peers_pass_their_check(task: str, dtype: torch.dtype) -> None:
    weights = from_shapes([[300, 200], [50, 300]], dtype, "cpu")
    before = [w.detach().clone() for w in weights]
    for method in methods(task, compiled=False):
        found = check(task, prepare(method, weights, L1, L2)[task], weights)
        assert found.reason is None, (method, found)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_pieces_of_a_tensor_are_checked_like_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = from_shapes([[300, 20], [0], [7]], torch.float32, "cpu")
    for task in FASTREG:
        call = prepare("fastreg", weights, L1, 1.01 * L2)[task]
        whole = check(task, call, weights).errors
        monkeypatch.setattr("bench.measure.peers.PIECE", 1000)
        assert check(task, call, weights).errors == pytest.approx(whole, rel=1e-6)
        monkeypatch.undo()


def session_of(folder: Path, compiled: str, seconds: float | None = None) -> Session:
    option = {"device": "cpu", "dtype": "float32", "rounds": 2, "models": None, "compiled": compiled}
    options = SimpleNamespace(results=folder, **{f"bench_{k}": v for k, v in {**option, "seconds": seconds}.items()})
    return Session(SimpleNamespace(option=options, pluginmanager=MagicMock()))  # type: ignore[arg-type]


def test_compiled_peers_alone_are_added_to_the_file_without_them(tmp_path: Path) -> None:
    first = session_of(tmp_path, "none")
    assert first.allows("foreach", "gpt2")
    assert not first.allows("foreach compiled", "gpt2")
    case = {"question": "value", "task": "value", "label": "gpt2", "method": "foreach"}
    first._record(case, "")
    second = session_of(tmp_path, "only")
    assert second.cases == [case]
    assert second.allows("foreach compiled", "gpt2")
    assert not second.allows("foreach", "gpt2")
    second._record({**case, "method": "foreach compiled"}, "")
    assert [c["method"] for c in results.read(tmp_path)[0]["cases"]] == ["foreach", "foreach compiled"]
    # Anew: its own are measured again, those of another commit are left out.
    assert session_of(tmp_path, "only").cases == [case]
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace('"commit": ', '"commit": "other", "was": '))
    assert session_of(tmp_path, "only").cases == []


def test_nothing_begins_when_time_is_over(tmp_path: Path) -> None:
    assert not session_of(tmp_path, "none").is_over()
    assert not session_of(tmp_path, "none", 1000.0).is_over()
    assert session_of(tmp_path, "none", 1e-9).is_over()


@pytest.mark.parametrize("task", FASTREG)
@pytest.mark.parametrize("strengths", [(L1, 0.0), (0.0, L2), (L1, 1.2 * L2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peer_with_a_wrong_term_is_refused(task: str, strengths: tuple[float, float], dtype: torch.dtype) -> None:
    weights = from_shapes([[300, 200], [200]], dtype, "cpu")
    found = check(task, prepare("fastreg", weights, *strengths)[task], weights)
    assert found.reason is not None
    assert "allowed" in found.reason


def test_a_peer_that_forgets_a_tensor_overflows_or_raises_is_refused() -> None:
    weights = from_shapes([[3000, 200], [200]], torch.float16, "cpu")
    zero_grads(weights)
    assert check("backward", prepare("fastreg", weights[:1], L1, L2)["backward"], weights).reason is not None
    assert "inf" in (check("value", lambda: torch.tensor(math.inf), weights).reason or "")
    assert "nan" not in str(check("value", lambda: torch.tensor(math.nan), weights).errors)
    assert check("value", lambda: 1 / 0, weights).reason == "raised ZeroDivisionError: division by zero"
    assert check("value", lambda: None, weights).reason is not None


def test_a_training_step_is_checked() -> None:
    from bench import test_questions as questions

    for method in ("fastreg", "foreach", questions.ATTACHED, questions.DECAY):
        step, _, found = questions.training_step(method, torch.empty(0))
        step()
        assert found().reason is None, method
    assert questions.training_step(questions.PLAIN, torch.empty(0))[2]().reason is not None


def test_every_question_is_asked_of_those_that_can_answer() -> None:
    class Session:
        models = ("mnist_mlp",)
        harness = Harness(CPU, torch.float32)

        def allows(self, method: str, label: str) -> bool:
            return method in PEERS

    from bench import test_questions as questions

    asked: Any = list(questions.cases(Session()))  # type: ignore[arg-type]
    assert {what[0] for what, _ in asked} == {*FASTREG, "size", "count", "tensors"}
    assert {what[3] for what, _ in asked if what[1] == "prox" and what[0] == "prox"} == {"fastreg", "loop", "foreach"}
    assert max(n_weights(shapes) for what, shapes in asked if what[0] == "size") == 10**8  # on a CPU
    assert {n_weights(shapes) for what, shapes in asked if what[0] == "tensors"} == {1 << 24}
    assert len(set(what for what, _ in asked)) == len(asked)


def test_quantiles() -> None:
    assert list(quantiles([5.0, 1.0, 2.0, 4.0, 3.0]).values()) == pytest.approx([1.8, 3.0, 4.2])
    assert quantiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}


class FakeBenchmark:
    """pytest-benchmark's fixture, as far as the harness uses it; round i takes i + 1 seconds."""

    def pedantic(self, call: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            call()
        self.stats = self
        self.data = [float(i + 1) for i in range(rounds)]


def test_every_round_follows_a_round_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(CPU, torch.float32, rounds=4)
    calls: list[str] = []
    call, reference = (lambda: calls.append("call")), (lambda: calls.append("reference"))
    found = harness.measure(FakeBenchmark(), call, reference, before=lambda: calls.append("before"))
    assert calls == ["call", *["before", "reference", "call"] * 4]
    assert found["rounds"] == 4
    assert found["seconds"]["p50"] == 2.5
    monkeypatch.setattr("bench.measure.harness.SECONDS_PER_CASE", {"cpu": 1e9})
    harness.rounds = None
    assert LEAST_ROUNDS <= harness.measure(FakeBenchmark(), call, reference)["rounds"] <= 200


def test_a_wrong_peer_is_recorded_but_not_timed(tmp_path: Path) -> None:
    option = {"device": "cpu", "dtype": "float32", "rounds": 2, "models": None, "compiled": None, "seconds": None}
    options = SimpleNamespace(results=tmp_path, **{f"bench_{name}": value for name, value in option.items()})
    session = Session(SimpleNamespace(option=options, pluginmanager=MagicMock()))  # type: ignore[arg-type]
    session.harness.copy_bandwidth = lambda: 1e9  # type: ignore[method-assign]
    benchmark: Any = FakeBenchmark()
    benchmark.extra_info = {}
    weights, calls = small_model(), []
    right, wrong = Found({"value": 1e-7}, None), Found({"value": math.inf}, "value off by inf")
    given = (lambda: calls.append("call")), (lambda: calls.append("floor")), (lambda: calls.append("before"))
    with pytest.raises(pytest.skip.Exception, match="not timed: value off by inf"):
        session.run(benchmark, ("value", "value", "small", "loop"), weights, wrong, *given)
    with pytest.raises(pytest.fail.Exception, match="not timed: value off by inf"):
        session.run(benchmark, ("value", "value", "small", "fastreg"), weights, wrong, *given)
    assert calls == []
    session.run(benchmark, ("prox", "prox", "small", "loop"), weights, right, *given)
    assert calls[:7] == ["call", *["before", "floor", "call"] * 2]
    (stored,) = results.read(tmp_path)
    assert [case["status"] for case in stored["cases"]] == ["failed", "failed", "measured"]
    measured = stored["cases"][-1]
    n_bytes = 2 * 4 * sum(w.numel() for w in weights)  # two passes
    assert (measured["bytes"], measured["bytes_per_second"]) == (n_bytes, pytest.approx(n_bytes / 1.5, rel=1e-3))
    assert measured["share_of_copy"] == pytest.approx(n_bytes / 1.5e9, rel=1e-3)


def test_floor_adds_in_place_and_copy_has_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measure.harness.COPY_ELEMENTS", {"cpu": 1000})
    harness = Harness(CPU, torch.float32)
    assert count(harness.floor(10)) == [("add_", 1, 80, 40)]
    assert harness.copy_bandwidth() > 0


def test_costs_of_a_call() -> None:
    a = torch.ones(1000)
    assert launches(lambda: a.abs().sum(), CPU) == 2
    assert peak_extra_bytes(lambda: a.abs().square().sum(), CPU) == pytest.approx(8000, abs=200)
    assert peak_extra_bytes(lambda: a.add_(1), CPU) < 200


def test_shapes_are_those_of_the_models() -> None:
    assert set(MODELS) == set(SHAPES)
    sizes = [n_weights(SHAPES[model]) for model in MODELS]
    assert sizes == sorted(sizes)


def made_up_results(device_type: str) -> tuple[dict[str, Any], list[results.Case]]:
    """A results file in which nothing was measured."""
    environment = {"device": f"Imaginary {device_type}", "device_type": device_type, "threads": 3, "torch": "9.9"}
    environment |= {"commit": "0123456789ab", "dirty": False}
    cases: list[results.Case] = []
    factors = {"fastreg": 1.5, "torch.cat": 30.0, "loop": 12.0, "foreach": 6.0}
    for question, label in [(t, "mnist_mlp") for t in FASTREG] + [
        ("size", "1000"),
        ("size", "1000000"),
        ("step", "mlp"),
    ]:
        task = "backward" if question == "size" else question
        for method, factor in factors.items():
            times = {"p20": factor * 1e-3, "p50": factor * 1e-3, "p80": factor * 2e-3}
            case = {"question": question, "task": task, "label": label, "method": method, "dtype": "float32"}
            case |= {"n_weights": 1000, "n_tensors": 1, "errors": {"value": 1e-7}, "status": "measured", "rounds": 5}
            case |= {"seconds": times, "ratio": {"p50": factor}, "launches": 2, "peak_extra_bytes": 10}
            case |= {"bytes_per_second": 1e9, "share_of_copy": 0.5, "copy_bytes_per_second": 2e9}
            cases.append({**case, "host_seconds": 1e-5 if device_type == "cuda" else None})
    failed = {"question": "value", "task": "value", "label": "gpt2", "method": "torch.cat", "dtype": "float32"}
    cases.append({**failed, "status": "failed", "reason": "value off by inf (relative)", "errors": {"value": "inf"}})
    return environment, cases


def test_report_renders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LEDGER_MODELS", ("mnist_mlp",))
    results.write(tmp_path / "in" / "made-up.json", *made_up_results("cpu"))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    report.main(tmp_path / "in", tmp_path / "docs", readme)
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "Imaginary cpu, 3 threads; PyTorch 9.9; commit 0123456789ab." in text
    assert "| mnist_mlp | 1.50 | 30.00 | 12.00 | 6.00 |" in text
    assert "- torch.cat, value, gpt2: value off by inf (relative)" in text
    assert "| llama3.2_1b | not measured yet |" in text  # there is no GPU in this file
    for name in (line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")):
        assert (tmp_path / "docs" / name).stat().st_size > 1000
        assert (tmp_path / "docs" / name).with_suffix(".png").exists()
    shown = readme.read_text()
    assert shown.startswith("before\n")
    assert shown.endswith("after\n")
    assert "old" not in shown
    assert "| mnist_mlp | 20.0x | 8.0x | 4.0x |" in shown


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    environment, cases = made_up_results("cpu")
    results.write(tmp_path / "b.json", environment, [{**cases[0], "seconds": {"p50": 0.123456}}])
    results.write(tmp_path / "c.json", *made_up_results("cuda"))
    gpu, cpu = results.read(tmp_path)
    assert (gpu["environment"], gpu["cases"]) == made_up_results("cuda")
    assert cpu == {"environment": environment, "cases": [{**cases[0], "seconds": {"p50": 0.1235}}]}


def test_stored_results_make_the_document_and_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LEDGER_MODELS", ())  # what is counted may change with PyTorch
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *args, **keywords: None)
    found, document = results.read(), (results.ROOT / "docs" / "benchmarks.md").read_text()
    assert report.report(found, tmp_path / "img").split("## Launches")[0] == document.split("## Launches")[0]
    assert report.readme_block(found) in (results.ROOT / "README.md").read_text()


def test_results_file_names_device_and_dtype() -> None:
    assert results.file_name({"device": "Some(R) CPU @ 2GHz"}, "float32") == "some-cpu-2ghz-float32"


def settings_now() -> tuple[dict[str, int], int]:
    return internals.kernel_settings(), plan.CPU_BLOCK


def test_candidates_take_turns_with_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    cases = {str(size): ({"CPU_BLOCK": size}, lambda: order.append(("called", plan.CPU_BLOCK))) for size in (64, 128)}
    harness = Harness(CPU, torch.float32)
    monkeypatch.setattr(harness, "floor", lambda n: lambda: order.append(("floor", plan.CPU_BLOCK)))
    found = tune.take_turns(harness, 1000, cases, rounds=3)
    turn = ["called", "called", "floor", "called"]
    assert order == [(what, size) for size in (64, 128) for what in turn] * 4  # a round to warm up, and three
    assert set(found) == set(cases)


@pytest.mark.parametrize("module", ["kernel", "blocks"])
def test_settings_that_fail_leave_the_librarys_own(module: str) -> None:
    pytest.importorskip("triton")
    own = settings_now()
    chosen = {"BLOCK": 1024, "NUM_WARPS": 8, "MOST_CHUNKS": 2} if module == "kernel" else {"CPU_BLOCK": 64}

    def fail() -> None:
        assert settings_now() != own
        raise RuntimeError("no such setting")

    with pytest.raises(RuntimeError, match="no such setting"):
        tune.take_turns(Harness(CPU, torch.float32), 10, {"failing": (chosen, fail)}, rounds=1)
    assert settings_now() == own


def test_tuning_is_stored_with_what_it_ran_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "CPU_BLOCKS", [{"CPU_BLOCK": 1 << 15}, {"CPU_BLOCK": 1 << 16}])
    tune.main(["blocks", "--model", "mnist_mlp", "--rounds", "1", "--out", str(tmp_path / "found.json")])
    stored = json.loads((tmp_path / "found.json").read_text())
    assert stored["model"] == "mnist_mlp"
    assert stored["environment"]["torch"] == torch.__version__
    median = stored["ratio"]["1 add_grad"]["p50"]
    assert re.search(rf"^\| 65536 \| .* {median:.2f} \|", capsys.readouterr().out, re.MULTILINE)


def test_every_setting_of_the_kernels_computes_the_same(
    path: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    impl, device = path
    if impl != "triton":
        pytest.skip("tunes the Triton path")
    values = []
    one_sweep = internals.one_sweep

    def spy(*args: Any, **keywords: Any) -> Any:
        found = one_sweep(*args, **keywords)
        if found is not None:
            values.append(float(found.total))
        return found

    monkeypatch.setattr(internals, "one_sweep", spy)
    own = settings_now()
    settings = [own[0], {"BLOCK": 1024, "NUM_WARPS": 8, "MOST_CHUNKS": 2}]
    harness = Harness(torch.device(device), torch.float32)
    tune.tune_settings(harness, [[300, 20], [7]], settings, "triton", rounds=1)
    assert len(values) > 8
    assert len(set(values)) == 1
    assert "| 1024 | 8 | 2 |" in capsys.readouterr().out
    assert settings_now() == own


def test_host_times_are_differences_to_a_pass_without_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def takes(seconds: float) -> Any:
        return lambda: now.__setitem__(0, now[0] + seconds)

    seconds = {
        ("adds", host.NOTHING): 1.0,
        ("adds", host.EMPTY): 1.5,
        ("adds", "fastreg"): 3.0,
        ("adds", "foreach"): 9.0,
    }
    seconds |= {("kept", "fastreg"): 5.0, ("one-liner", "fastreg"): 7.0}
    seconds |= {("add_grad", host.ONE_ADD): 2.0, ("add_grad", "fastreg"): 3.0, ("prox", "fastreg"): 0.5}

    def candidates(weights: list[nn.Parameter]) -> dict[host.Key, Any]:
        def call(task: str, takes: Any) -> None:
            assert all((w.grad is not None) == (task in host.ALONE) for w in weights)
            takes()

        return {key: functools.partial(call, key[0], takes(each)) for key, each in seconds.items()}

    monkeypatch.setattr(host, "candidates", candidates)
    restored = host.restore
    monkeypatch.setattr(host, "restore", lambda *given: (takes(100.0)(), restored(*given)))  # is not timed
    cases = host.measure(3, CPU, rounds=2, clock=lambda: now[0])
    assert {(c["task"], c["method"]): c["seconds"]["p50"] for c in cases} == seconds
    added, alone = "\n".join(host.tables(cases)).split("\n\n")
    assert "| cpu | 3 | fastreg | 2,000,000.0 | 0.25 | - | 4.00 | 6,000,000.0 | 1.50 |" in added
    assert "| cpu | 3 | fastreg | 3,000,000.0 | 1.50 | 500,000.0 | 0.25 |" in alone


def test_what_is_added_to_a_pass_is_the_gradient_of_the_penalty() -> None:
    weights = small_model()
    calls = host.candidates(weights)
    assert {task for task, _ in calls} == {"adds", "kept", "one-liner", *host.ALONE}
    for w in weights:
        w.grad = None
    calls["adds", host.NOTHING]()
    plain = [w.grad for w in weights]
    assert all(torch.equal(g, -w) for g, w in zip(plain, weights, strict=True) if g is not None)
    for key in [("adds", method) for method in PEERS] + [("kept", "fastreg"), ("one-liner", "fastreg")]:
        for w in weights:
            w.grad = None
        calls[key]()
        for w, g in zip(weights, plain, strict=True):
            assert w.grad is not None
            torch.testing.assert_close(w.grad - g, L1 * w.sign() + 2 * L2 * w, msg=str(key))


def test_host_time_is_measured_stored_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LEDGER_MODELS", ())
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *args, **keywords: None)
    host.main(["--counts", "1,6", "--rounds", "3", "--device", "cpu", "--results", str(tmp_path)])
    (found,) = results.read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"host-{results.device_name(found['environment'])}.json"]
    text = report.report([found], tmp_path / "img").split("## Host time")[1]
    both = ["fastreg", *([] if internals.launch is None else [host.STUBBED])]
    added, alone = text.split("| add_grad, µs |")
    for n in (1, 6):
        for method in (host.EMPTY, *both, "torch.cat", "loop", "foreach"):
            assert f"| cpu | {n} | {method} | " in added
        for method in (host.ONE_ADD, *both, "loop", "foreach"):
            assert f"| cpu | {n} | {method} | " in alone
    found["environment"] |= {"device": "Imaginary GPU", "device_type": "cuda", "cpu": "Imaginary CPU"}
    found["cases"] += [{**case, "device_type": "cuda"} for case in found["cases"]]
    text = report.report([found], tmp_path / "img")
    assert "Imaginary GPU beside Imaginary CPU; PyTorch" in text
    assert "| cuda | 6 | fastreg | " in text
    assert "GPU: not measured yet." in report.readme_block([found])  # of sweeps


def test_stubs_are_gone_afterwards() -> None:
    launch = pytest.importorskip("fastreg.kernels.launch")
    own = launch._sweep_kernel, launch._finish_kernel, fastreg.kernels.INTERPRETED
    weights = small_model()
    before = [w.detach().clone() for w in weights]

    def fail() -> None:
        with internals.stubbed_launches():
            fastreg.elastic_prox_(weights, L1, L2, lr=1.0, impl="triton")
            assert layout._LAYOUTS
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        fail()
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert (launch._sweep_kernel, launch._finish_kernel, fastreg.kernels.INTERPRETED) == own
    assert not layout._LAYOUTS
