"""How long a step may take, by what others took."""

from scheduler_service.engine.step_watch import StepCosts


def test_before_any_step_there_is_time_to_build_and_map() -> None:
    assert StepCosts().patience(1) == 30.0


def test_a_step_may_take_ten_times_what_its_size_took() -> None:
    costs = StepCosts()
    costs.observe(100, 0.5)
    assert costs.patience(120) == 5.0


def test_short_steps_have_three_seconds() -> None:
    costs = StepCosts()
    costs.observe(100, 0.01)
    assert costs.patience(100) == 3.0


def test_a_smaller_step_takes_no_longer_than_a_larger_one() -> None:
    costs = StepCosts()
    costs.observe(32, 0.5)
    costs.observe(600, 2.0)
    assert costs.patience(31) == 5.0
    assert costs.patience(100) == 20.0


def test_a_larger_step_than_any_before_has_time_in_proportion() -> None:
    costs = StepCosts()
    costs.observe(64, 2.0)
    assert costs.patience(256) == 80.0
    costs = StepCosts()
    costs.observe(64, 0.1)
    assert costs.patience(256) == 30.0
