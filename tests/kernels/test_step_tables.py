"""The kernels' own copy of the table of steps, which they need as they import Triton alone, is that of the library."""

import pytest

pytest.importorskip("triton")

from fastreg.core.types import (
    COUNTING,
    STATES,
    STEPS,
    AdamSettings,
    ElementwiseProxSettings,
    Mode,
    SGDSettings,
    states_of,
)
from fastreg.kernels import steps, sweep, tables

SETTINGS = {
    Mode.SGD: SGDSettings,
    Mode.MOMENTUM: SGDSettings,
    Mode.ADAM: AdamSettings,
    Mode.AMSGRAD: AdamSettings,
    Mode.ELEMENTWISE_PROX: ElementwiseProxSettings,
}


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.value)
def test_states_and_settings_of_every_mode(mode: Mode) -> None:
    name = mode.value
    assert steps._has_settings(name) == (mode in STATES) == (mode in SETTINGS)
    assert steps._is_step(name) == (mode in STEPS)
    assert steps._counts_steps(name) == (mode in COUNTING)
    assert steps._states(name) == STATES.get(mode, ())
    assert [steps._has_state(name, number) for number in (1, 2, 3)] == [n < len(STATES.get(mode, ())) for n in range(3)]
    if mode in STATES:
        assert states_of(mode) == STATES[mode]
        assert steps._columns(name) == SETTINGS[mode]._fields
        assert steps._n_columns(name) == len(SETTINGS[mode]._fields)
        assert [steps._column(name, column) for column in steps._columns(name)] == list(range(steps._n_columns(name)))
    assert steps._column("sgd", "eps") == -1


def test_a_row_of_states_has_room_for_all_of_them() -> None:
    assert tables.STATE_COLUMNS == sweep.STATE_COLUMNS.value == 1 + max(map(len, STATES.values()))


def test_modes_without_an_entry_are_no_steps() -> None:
    with pytest.raises(ValueError, match="no kernel makes a step of mode 'no_such_mode'"):
        steps._has_state("no_such_mode", 1)
    with pytest.raises(ValueError, match=r"Mode\.PROX is not a step"):
        states_of(Mode.PROX)
