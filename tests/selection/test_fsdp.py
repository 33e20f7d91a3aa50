"""Parameters that FSDP2 shows gathered, and shards of DTensors, with and without PyTorch's private names."""

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastreg
from fastreg.core.torch_private import shown_by_fsdp
from tests.support.cases import L1, L2
from tests.support.check_sharded import check_everything
from tests.support.ranks import AVAILABLE, Case, Ranks, on_processes, tensor

pytestmark = on_processes
if AVAILABLE:
    from torch.distributed.fsdp import fully_shard

PARAMETER = nn.Parameter(torch.zeros(2))


def fsdp_module(**state: Any) -> Any:
    return SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(**state))


def fsdp_group(**param: Any) -> Any:
    return SimpleNamespace(is_sharded=False, fsdp_params=[SimpleNamespace(**param)])


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        (fsdp_module(_fsdp_param_groups=[fsdp_group(_unsharded_param=PARAMETER)]), [PARAMETER]),
        (fsdp_module(_fsdp_param_group=fsdp_group(_unsharded_param=PARAMETER)), [PARAMETER]),
        (fsdp_module(_fsdp_param_group=None), []),
        (fsdp_module(_fsdp_param_groups=[SimpleNamespace(is_sharded=True)]), []),
        (SimpleNamespace(), None),
        (SimpleNamespace(_get_fsdp_state=lambda other: None), None),
        (fsdp_module(), None),
        (fsdp_module(_fsdp_param_groups=None), None),
        (fsdp_module(_fsdp_param_groups=[SimpleNamespace()]), None),
        (fsdp_module(_fsdp_param_groups=[SimpleNamespace(is_sharded=False)]), None),
        (fsdp_module(_fsdp_param_groups=[fsdp_group()]), None),
    ],
)
def test_parameters_that_fsdp_shows(module: Any, shown: list[Tensor] | None) -> None:
    found = shown_by_fsdp(module)
    assert found is shown is None or list(map(id, found or [])) == list(map(id, shown or []))


def gathered_weights_are_refused_where_fsdp_cannot_be_asked(ranks: Ranks) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1)).to(ranks.device)
    for layer in (net[0], net):
        fully_shard(layer, mesh=ranks.mesh())
    value = fastreg.elastic_penalty(net, L1, L2, impl=ranks.impl).detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastreg.selection.fsdp.shown_by_fsdp", lambda module: None)
        reg = fastreg.ElasticNet(net, L1, L2, impl=ranks.impl)
        assert torch.equal(reg().detach(), value)
        loss = net(tensor(8, 7, seed=9).to(ranks.device)).square().mean()
        with pytest.raises(RuntimeError, match=r"'2\.weight' is gathered by FSDP"):
            reg()
        loss.backward()
        assert torch.equal(reg().detach(), value)


def shards_of_dtensors_by_their_public_name(ranks: Ranks) -> None:
    for broken in (operator.attrgetter("_gone"), lambda tensor: "something else"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastreg.core.dtensor.local_tensor", broken)
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 8)).to(ranks.device)
            fully_shard(net, mesh=ranks.mesh())
            check_everything(ranks, list(net.parameters()), n_collectives=1)
            penalty = fastreg.elastic_penalty(net, L1, L2, impl=ranks.impl)
            with torch.no_grad():
                net[0].weight.mul_(2)
            with pytest.raises(RuntimeError, match="modified"):
                penalty.backward()


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (gathered_weights_are_refused_where_fsdp_cannot_be_asked, shards_of_dtensors_by_their_public_name)
}


@pytest.mark.parametrize("name", CASES)
def test_on_every_rank(on_every_rank: Callable[[str], None], name: str) -> None:
    on_every_rank(name)
