"""include, exclude, names and group keys: what they match, and what is said where they match nothing."""

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastreg


def selected(params: Any, **filters: Any) -> list[str]:
    return list(fastreg.ElasticNet(params, 1.0, **filters)._selection.names)


def model() -> nn.Module:
    net = nn.Module()
    net.encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net.head = nn.Linear(3, 2)
    net.scale = nn.Parameter(torch.ones(()))
    return net


NAMES = [name for name, _ in model().named_parameters()]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"include": nn.BatchNorm1d}, ["encoder.1.weight", "encoder.1.bias"]),
        ({"include": (nn.BatchNorm1d, nn.Linear)}, [n for n in NAMES if n != "scale"]),
        ({"include": nn.modules.batchnorm._BatchNorm}, ["encoder.1.weight", "encoder.1.bias"]),
        ({"exclude": nn.BatchNorm1d}, [n for n in NAMES if "encoder.1" not in n]),
        ({"include": "weight", "exclude": nn.BatchNorm1d}, ["encoder.0.weight", "head.weight"]),
    ],
)
def test_module_classes_select_what_such_modules_own(filters: Any, expected: list[str]) -> None:
    assert sorted(selected(model(), **filters)) == sorted(expected)
    assert sorted(selected([{"params": model()}], **filters)) == sorted(expected)


def test_module_classes_select_tied_weights_of_any_owner() -> None:
    net = nn.Module()
    net.table = nn.Embedding(4, 3)
    net.head = nn.Linear(3, 4, bias=False)
    net.head.weight = net.table.weight
    assert selected(net, include=nn.Linear) == ["table.weight"]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("bais", r"did you mean '.*bias'"),
        ("encodr", "did you mean 'encoder"),
        ("zzzzzz", "their names are like"),
        (nn.Conv2d, "exclude=Conv2d matches none of 7 trainable parameters"),
        (lambda name, param: False, "matches none of 7 trainable parameters"),
    ],
)
def test_exclude_that_matches_nothing_warns_with_names(pattern: Any, hint: str) -> None:
    with pytest.warns(UserWarning, match=hint):
        assert selected(model(), exclude=pattern) == NAMES
    with pytest.raises(ValueError, match=r"nothing selected: include=.* matches none of 7 trainable parameters"):
        fastreg.elastic_penalty(model(), 1.0, include=pattern)


def test_include_names_what_comes_nearest() -> None:
    with pytest.raises(ValueError, match=r"include='haed\.weight' matches none.*did you mean 'head\.weight'"):
        fastreg.elastic_penalty(model(), 1.0, include="haed.weight")


def test_filters_of_frozen_parameters_do_not_warn() -> None:
    net = model()
    net.head.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selected(net, exclude="head") == [n for n in NAMES if "head" not in n]
        assert selected(nn.Linear(2, 2, bias=False), exclude=fastreg.bias_and_norm) == ["weight"]
    with pytest.raises(ValueError, match="include='head' matches none of 5 trainable parameters"):
        fastreg.elastic_penalty(net, 1.0, include="head")


@pytest.mark.parametrize("which", ["include", "exclude"])
@pytest.mark.parametrize("predicate", [lambda name: True, lambda: True, lambda a, b, c: True])
def test_predicates_of_other_arguments_are_refused(which: str, predicate: Callable[..., bool]) -> None:
    with pytest.raises(TypeError, match=rf"{which} is called with two arguments, \(name, param\)"):
        fastreg.elastic_penalty(model(), 1.0, **{which: predicate})


@pytest.mark.parametrize(
    "pattern", [nn.Linear(2, 2), (), (nn.Linear, "bias"), (int,), str, nn.Parameter, re.compile(b"x"), 3], ids=str
)
def test_other_filters_are_refused(pattern: Any) -> None:
    with pytest.raises(TypeError, match="include must be a regular expression, a callable"):
        fastreg.elastic_penalty(model(), 1.0, include=pattern)


class ClassicPredicate:
    """A callable object, whose signature leaves out self."""

    def __call__(self, name: str, param: torch.Tensor) -> bool:
        return name == "scale"


def test_callable_objects_and_patterns() -> None:
    assert selected(model(), include=ClassicPredicate()) == ["scale"]
    assert selected(model(), include=re.compile("^SCALE$", re.IGNORECASE)) == ["scale"]
    assert selected(model(), include=lambda *args: args[0] == "scale") == ["scale"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names_are_those_of_the_users_model() -> None:
    net = model()
    compiled_inside = model()
    compiled_inside.encoder[0] = torch.compile(compiled_inside.encoder[0])
    named_module = nn.Module()
    named_module.module = model()
    outer = nn.Module()
    outer.net = nn.DataParallel(model())
    for wrapped, expected in [
        (nn.DataParallel(net), NAMES),
        (torch.compile(net), NAMES),
        (nn.DataParallel(torch.compile(net)), NAMES),
        (torch.compile(nn.DataParallel(net)), NAMES),
        (compiled_inside, NAMES),
        (outer, [f"net.{name}" for name in NAMES]),
        (named_module, [f"module.{name}" for name in NAMES]),  # the user's own name
    ]:
        assert sorted(selected(wrapped)) == sorted(expected)
        start = "^" + expected[-1].removesuffix(NAMES[-1]).replace(".", r"\.")
        assert len(selected(wrapped, include=f"{start}head")) == 2


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        *[(key, "l1") for key in ("L1", "l_1", "lambda1", "lambda_1", "l1_lambda", "reg1", "L1_strength", "reg_l1")],
        *[(key, "l2") for key in ("L2", "lambda2", "l2_reg")],
        *[(key, "params") for key in ("parameters", "param", "Params", "PARAMS", "prams", "parameter")],
    ],
)
def test_misspelt_group_keys_are_refused(key: str, meant: str) -> None:
    group = {"params": [torch.ones(2)], key: 0.5}
    if meant == "params":
        group = {key: [torch.ones(2)]}
    with pytest.raises(ValueError, match=rf"groups\[0\] has a key '{key}', which means nothing here; write '{meant}'"):
        fastreg.elastic_penalty([group], 0.5)


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_filters_in_a_group_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"groups\[0\] has a key '{key}', which is an argument of the call"):
        fastreg.elastic_penalty([{"params": model(), key: "bias"}], 0.5)


def test_single_group_with_misspelt_params_is_a_group() -> None:
    with pytest.raises(ValueError, match=r"groups\[0\] has a key 'parms', which means nothing here; write 'params'"):
        fastreg.elastic_penalty({"parms": model().parameters(), "l1": 0.5}, 0.5)


def test_mapping_of_named_parameters_may_have_one_called_params() -> None:
    named = {"params": nn.Parameter(torch.ones(3)), "bias": nn.Parameter(torch.ones(4))}
    assert float(fastreg.elastic_penalty(named, 1.0).detach()) == 7.0
    learnt = nn.Parameter(torch.tensor(2.0))
    assert float(fastreg.elastic_penalty({"params": named["params"], "l1": learnt}, 1.0).detach()) == 6.0


def test_warning_names_the_line_of_the_caller() -> None:
    net = model()
    for call in (
        lambda: fastreg.elastic_penalty(net, 0.5, exclude="zzz"),
        lambda: fastreg.add_elastic_grad_(net, 0.5, exclude="zzz"),
        lambda: fastreg.ElasticNet(net, 0.5, exclude="zzz"),
        lambda: fastreg.sparsity(net, exclude="zzz"),
    ):
        with pytest.warns(UserWarning, match="matches none of 7") as seen:
            call()
        assert seen[0].filename == __file__


@pytest.mark.parametrize("which", ["include", "exclude"])
def test_module_classes_need_a_module(which: str) -> None:
    with pytest.raises(ValueError, match=f"{which} selects by the module that owns a parameter, but params holds no"):
        fastreg.elastic_penalty(model().parameters(), 1.0, **{which: nn.Linear})


def test_names_that_an_optimizer_keeps_are_used() -> None:
    optimizer = torch.optim.SGD(model().named_parameters(), lr=0.1)
    assert selected(optimizer.param_groups, include="head") == ["head.weight", "head.bias"]


def test_keys_of_optimizers_are_ignored() -> None:
    w = nn.Parameter(torch.ones(3))
    makers: list[Any] = [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.ASGD, torch.optim.Rprop]
    makers += [torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax]
    for maker in makers:
        optimizer = maker([("w", w)], lr=0.1)  # with names, which stand under param_names
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # leaves initial_lr
        assert float(fastreg.elastic_penalty(optimizer.param_groups, 0.5).detach()) == 1.5


def test_unknown_attributes_are_refused() -> None:
    reg = fastreg.ElasticNet(model(), 0.1)
    for name in ("lambda1", "L1", "strength"):
        with pytest.raises(AttributeError, match=name):
            setattr(reg, name, 3.0)
    reg.l1 = 0.2
    reg.last = None


class WithAName(fastreg.ElasticNet):
    """Subclasses may have attributes."""


class WithASlot(fastreg.ElasticNet):
    """In a slot, too."""

    __slots__ = ("name",)


@pytest.mark.parametrize("kind", [WithAName, WithASlot])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda reg: pickle.loads(pickle.dumps(reg))])
def test_subclasses_may_have_attributes(kind: Any, duplicate: Any) -> None:
    reg = kind(nn.Linear(3, 2), 0.1)
    reg.name = "mine"
    twin = duplicate(reg)
    assert twin.name == "mine"
    assert torch.equal(twin(), reg())


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_have_strengths_of_their_own(duplicate: Any) -> None:
    reg = fastreg.ElasticNet(nn.Linear(3, 2), 1.0)
    before = reg().detach()
    twin = duplicate(reg)
    twin.l1 = 5.0
    assert (reg.l1, twin.l1) == (1.0, 5.0)
    assert torch.equal(reg().detach(), before)
    torch.testing.assert_close(twin().detach(), 5 * before)
    # What compiled code reads.
    assert [float(t) for t in reg._for_compilers or ()] == [1.0, 0.0]
    assert [float(t) for t in twin._for_compilers or ()] == [5.0, 0.0]


def test_repr_is_one_line() -> None:
    assert repr(fastreg.ElasticNet(nn.Linear(3, 2), nn.Parameter(torch.ones(())), 0.5)) == (
        "ElasticNet(2 tensors, 8 weights, l1=tensor, l2=0.5)"
    )


@pytest.mark.parametrize("reduce", ["mean", "sum", 1, None])
def test_reduce_takes_a_bool(reduce: Any) -> None:
    reg = fastreg.ElasticNet(model(), 0.1)
    for call in (
        lambda: fastreg.elastic_penalty(model(), 0.1, reduce=reduce),
        lambda: fastreg.add_elastic_grad_(model(), 0.1, reduce=reduce),
        lambda: reg(reduce=reduce),
        lambda: reg.add_grad_(reduce=reduce),
    ):
        with pytest.raises(TypeError, match="reduce must be True"):
            call()


def test_lists_and_group_dicts_are_copied() -> None:
    """What is changed in them later is not seen, neither at once nor when something else is noticed."""
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    weights = [one]
    group: dict[str, Any] = {"params": [one], "l1": 0.5}
    groups = [group]
    regs = [fastreg.ElasticNet(weights, 0.5), fastreg.ElasticNet(groups), fastreg.ElasticNet({"one": one}, 0.5)]
    weights.append(two)
    group["l1"] = 100.0
    group["params"].append(two)
    groups.append({"params": [two], "l1": 1.0})
    for _ in range(2):
        assert [float(reg().detach()) for reg in regs] == [1.0, 1.0, 1.0]
        one.requires_grad_(False)
        one.requires_grad_(True)
    regs[1].l1 = 3.0
    assert float(regs[1]().detach()) == 1.0  # the group's own strength was copied, too


def test_modules_in_groups_are_followed() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    reg = fastreg.ElasticNet([{"params": net, "l1": 1.0}])
    net.append(nn.Linear(2, 3, bias=False))
    expected = sum(float(p.detach().abs().sum()) for p in net.parameters())
    assert float(reg().detach()) == pytest.approx(expected, rel=1e-6)


def test_the_ready_callable_in_quotes() -> None:
    with pytest.warns(UserWarning, match=r"exclude='bias_and_norm' matches none .* without quotes\?"):
        fastreg.elastic_penalty(nn.Linear(2, 2), 0.1, exclude="bias_and_norm")
