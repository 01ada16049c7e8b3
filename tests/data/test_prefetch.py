"""Work ahead of its consumer: in order, a bounded number at once, errors in their turn."""

import threading

import pytest

from dbtrain.data.prefetch import ahead


def test_results_come_in_the_order_of_the_items():
    assert list(ahead(lambda number: number**2, range(100), threads=4)) == [number**2 for number in range(100)]


def test_no_more_than_depth_and_one_items_are_taken_before_the_first_result_is_asked_for_again():
    taken = []
    results = ahead(lambda number: number, (taken.append(number) or number for number in range(50)), threads=2, depth=3)
    for number in range(20):
        assert next(results) == number
        assert len(taken) <= number + 4
    results.close()
    assert len(taken) <= 24


def test_an_error_comes_in_its_items_turn_and_work_runs_in_threads():
    def work(number):
        if number == 3:
            raise ValueError("three")
        return threading.current_thread()

    results = ahead(work, range(6), threads=2)
    assert all(next(results) is not threading.main_thread() for _ in range(3))
    with pytest.raises(ValueError, match="three"):
        next(results)
