import pickle

import pytest

from kdfast.schedules import Constant, Linear, Piecewise, Ramp, Until


def test_ramp_takes_the_documented_values():
    ramp = Ramp(0.7)
    values = [ramp(p) for p in (0.0, 0.05, 0.10, 0.15, 0.20, 0.5, 1.0)]
    assert values == pytest.approx([0.10, 0.25, 0.40, 0.55, 0.70, 0.70, 0.70])


def test_ramp_down_and_ramp_of_no_length():
    assert Ramp(0.05, start=0.1, until=0.5)(0.25) == pytest.approx(0.075)
    assert Ramp(0.7, until=0.0)(0.0) == 0.7


def test_constant_and_linear():
    assert [Constant(2.0)(p) for p in (0.0, 0.3, 1.0)] == [2.0, 2.0, 2.0]
    assert [Linear(3.0, 1.5)(p) for p in (0.0, 0.5, 1.0)] == [3.0, 2.25, 1.5]


def test_until_is_the_schedule_and_then_nothing():
    half = Until(Ramp(0.7), 0.5)
    assert [half(p) for p in (0.0, 0.1, 0.49, 0.5, 1.0)] == pytest.approx([0.1, 0.4, 0.7, 0.0, 0.0])
    assert [Until(Constant(2.0), 0.0)(p) for p in (0.0, 1.0)] == [0.0, 0.0]


def test_piecewise_in_equal_parts_switches_at_the_boundary():
    steps = Piecewise([3.0, 2.0, 1.5])
    assert [steps(p) for p in (0.0, 0.33, 1 / 3, 0.5, 2 / 3, 1.0)] == [3.0, 3.0, 2.0, 2.0, 1.5, 1.5]


def test_piecewise_with_boundaries():
    steps = Piecewise([3.0, 2.0], [0.1])
    assert [steps(p) for p in (0.0, 0.0999, 0.1, 1.0)] == [3.0, 3.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", [Linear(3.0, 1.0), Ramp(0.7), Piecewise([3.0, 2.0]), Until(Ramp(0.7), 0.5)])
def test_progress_outside_the_run_counts_as_its_end(schedule):
    assert schedule(-0.5) == schedule(0.0)
    assert schedule(1.5) == schedule(1.0)


@pytest.mark.parametrize(
    "schedule", [Constant(1.0), Linear(3.0, 1.0), Ramp(0.7), Piecewise([3, 2, 1]), Until(Ramp(0.7), 0.5)]
)
def test_schedules_survive_pickling(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ramp(0.7, until=1.5), "until=1.5"),
        (lambda: Piecewise([]), "values is empty"),
        (lambda: Piecewise([1, 2, 3], [0.5]), "with 3 values; expected 2 increasing"),
        (lambda: Piecewise([1, 2, 3], [0.6, 0.5]), "boundaries="),
        (lambda: Piecewise([1, 2], [0.0]), "strictly between 0 and 1"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
