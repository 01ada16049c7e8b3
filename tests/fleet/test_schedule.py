"""The schedule by itself and in a simulated cluster, up to 100,000 subjects on 1,000 workers."""

import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbtrain.fleet.schedule import Idle, Limits, View, schedule, unit_size
from tests.kit.fleet_simulation import Cluster, tail_efficiency

READY = Limits(prior_parts=0)


def view_of(classes):
    view = View()
    for position, noun in enumerate(classes):
        view.add(noun, position)
    return view


def idle(count):
    return [Idle(f"w{i}") for i in range(count)]


def test_a_unit_keeps_to_one_class_and_to_storage_order():
    view = view_of(["dog", "cat"] * 50)
    given_out = schedule(view, idle(2), 2, READY)
    assert {unit.class_noun for _, unit in given_out} == {"dog", "cat"}
    for _, unit in given_out:
        start = unit.positions[0]
        assert unit.positions == tuple(range(start, start + 2 * len(unit.positions), 2)) and start in (0, 1)


def test_what_is_given_out_is_under_way():
    view = view_of(["dog"] * 30)
    first, second = (schedule(view, idle(3), 3, READY) for _ in range(2))
    taken = [position for _, unit in (*first, *second) for position in unit.positions]
    assert taken + list(view.waiting["dog"]) == list(range(30)) and view.busy["dog"] == 6


def test_a_worker_stays_with_its_class():
    view = view_of(["dog"] * 90 + ["cat"] * 10)
    assert schedule(view, [Idle("w0", "cat")], 1, READY)[0][1].class_noun == "cat"
    assert schedule(view, [Idle("w0")], 1, READY)[0][1].class_noun == "dog"


@pytest.mark.parametrize("left, alive, pack, size", [
    (1000, 10, 1, 12), (39, 10, 1, 1), (1, 10, 1, 1), (100_000, 10, 1, 64), (1000, 10, 8, 8), (3000, 10, 8, 32),
    (100, 10, 8, 8), (16, 10, 8, 8), (9, 10, 8, 8),
])  # fmt: skip
def test_units_shrink_to_the_end_and_are_whole_packs(left, alive, pack, size):
    assert unit_size(left, alive, Limits(pack=pack, unit=64)) == size


def test_the_pack_depends_on_memory_that_ran_out_and_on_nothing_else():
    """Whoever is left, however many workers there are, and tried alone or not: the same rows, so the same bits."""
    limits = Limits(pack=8, prior_parts=0)
    for subjects, workers in ((1, 1), (3, 5), (16, 10), (200, 2)):
        units = [unit for _, unit in schedule(view_of(["dog"] * subjects), idle(workers), workers, limits)]
        assert {unit.pack for unit in units} == {8}
    view = view_of(["dog"] * 3)
    view.add("dog", 3, alone=True)
    view.add("dog", 4, alone=True, pack=2)
    units = {unit.positions: unit.pack for _, unit in schedule(view, idle(3), 3, limits)}
    assert units == {(3,): 8, (4,): 2, (0, 1, 2): 8}


def test_a_smaller_pack_is_for_those_that_ran_out_of_memory_only():
    view = View()
    for position in range(8):
        view.add("dog", position, pack=4 if position < 3 else None)
    limits = Limits(pack=8, prior_parts=0)
    (_, first), (_, second) = schedule(view, idle(2), 2, limits)
    assert (first.positions, first.pack) == ((0, 1, 2), 4)
    assert (second.positions, second.pack) == ((3, 4, 5, 6, 7), 8)


def test_returned_subjects_take_their_place_in_storage_order():
    view = view_of(["dog"] * 6)
    (_, unit), *_ = schedule(view, idle(1), 1, Limits(unit=3, rounds=1, prior_parts=0))
    assert unit.positions == (0, 1, 2)
    for position in (2, 0, 1):
        view.add("dog", position)
    assert list(view.waiting["dog"]) == [0, 1, 2, 3, 4, 5]


def test_priors_come_first_and_are_shared_out_while_workers_have_nothing_else():
    view = view_of(["dog"] * 20)
    given_out = schedule(view, idle(4), 4, Limits(prior_parts=3))
    assert [(unit.kind, unit.part, unit.parts) for _, unit in given_out] == [("prior", i, 3) for i in range(3)]
    assert schedule(view, idle(1), 4, Limits(prior_parts=3)) == []
    for _, unit in given_out:
        view.end(unit)
    assert schedule(view, idle(1), 4, Limits(prior_parts=3))[0][1].kind == "train"


def test_a_lost_part_of_the_priors_is_drawn_again():
    view = view_of(["dog"] * 4)
    (_, first), (_, second) = schedule(view, idle(2), 2, Limits(prior_parts=2))
    view.end(first, drawn=False), view.end(second)
    assert schedule(view, idle(2), 2, Limits(prior_parts=2)) == [("w0", first)]


def test_retries_are_alone_and_few_while_fresh_subjects_wait():
    view = view_of(["dog"] * 100)
    for position in range(200, 210):
        view.add("dog", position, alone=True)
    units = [unit for _, unit in schedule(view, idle(8), 8, READY)]
    assert [unit.positions for unit in units if unit.retry] == [(200,), (201,)]
    for queue in view.waiting.values():
        queue.clear()
    units += [unit for _, unit in schedule(view, idle(8), 8, READY)]
    assert sum(unit.retry for unit in units) == 8


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=120),
    st.integers(1, 12),
    st.integers(1, 8),
    st.integers(0, 3),
    st.sets(st.integers(0, 119), max_size=5),
    st.lists(st.tuples(st.floats(0, 60), st.integers(1, 4)), max_size=4),
    st.integers(0, 9),
)
def test_every_subject_ends_once_whatever_dies(classes, workers, pack, parts, poison, deaths, seed):
    births = tuple((second + 1, count) for second, count in deaths)
    costs = [1 + (position * 7919 + seed) % 5 for position in range(len(classes))]
    cluster = Cluster(
        classes, workers, Limits(pack=pack, prior_parts=parts), lambda p: costs[p],
        poison=frozenset(poison), deaths=tuple(deaths), births=births, seed=seed,
    )  # fmt: skip
    outcome = cluster.run()
    bad = {position for position in poison if position < len(classes)}
    assert outcome.quarantined == bad
    assert set(outcome.finished) == set(range(len(classes))) - bad
    assert set(outcome.finished.values()) <= {1}


def test_a_hundred_thousand_subjects_on_a_thousand_workers():
    """S/(ceil(S/(G*N))*G*N) is 100,000/104,000 = 0.962 for whole packs of G = 8; costs that vary by a factor of three
    and priors of 50 classes cost a little more."""
    classes = [f"c{position % 50}" for position in range(100_000)]
    shape = Limits(pack=8, unit=512, prior_parts=13)
    cluster = Cluster(classes, 1000, shape, lambda p: 20 + (p * 7919) % 41, prior_s=174.0)
    begin = time.process_time()
    outcome = cluster.run()
    spent_s = time.process_time() - begin
    assert len(outcome.finished) == 100_000
    efficiency = tail_efficiency(outcome, 1000)
    print(f"efficiency {efficiency:.4f}, {outcome.units} units, {1e6 * spent_s / 100_000:.0f} us a subject")
    assert efficiency > 0.94
    assert set(outcome.prior_parts) == set(classes) and max(outcome.prior_parts.values()) <= 13
    assert spent_s / 100_000 < 0.001


def test_stragglers_do_not_hold_up_the_end():
    """One worker of ten at a tenth of the speed: with equal shares it would need ten times as long as the others."""
    classes = ["dog"] * 2000
    cluster = Cluster(classes, 10, READY, speed=lambda worker: 0.1 if worker == 0 else 1.0)
    ideal_s = 2000 / 9.1
    assert cluster.run().makespan_s < 2.2 * ideal_s


def test_workers_that_come_later_are_used_and_lost_ones_missed_only():
    classes = ["dog"] * 1000
    steady = Cluster(classes, 10, READY).run().makespan_s
    grown = Cluster(classes, 10, READY, births=((10.0, 10),)).run().makespan_s
    shrunk = Cluster(classes, 10, READY, deaths=((10.0, 5),)).run()
    assert grown < 0.65 * steady
    assert steady < shrunk.makespan_s < 2.3 * steady and len(shrunk.finished) == 1000


def test_poison_costs_its_neighbours_nothing_but_its_own_tries():
    classes = ["dog"] * 400
    clean = Cluster(classes, 8, READY).run()
    poisoned = Cluster(classes, 8, READY, poison=frozenset(range(0, 400, 40))).run()
    assert poisoned.quarantined == set(range(0, 400, 40))
    # 10 subjects x 2 more tries of 1 s on 8 workers, and one second of granularity.
    assert poisoned.makespan_s <= clean.makespan_s + 2 * 10 / 8 + 1.5


def test_classes_share_the_workers():
    view = view_of(["dog"] * 500 + ["cat"] * 500 + ["car"] * 500)
    units = [unit for _, unit in schedule(view, idle(9), 9, READY)]
    assert Counter(unit.class_noun for unit in units) == {"dog": 3, "cat": 3, "car": 3}


def test_who_joins_a_long_backlog_starts_at_once_and_the_backlog_goes_on_at_half_the_speed():
    view, limits = View(), Limits(pack=2, unit=2, newest=True)
    for position in range(400):
        view.add("dog", position)
    view.priors["dog"].parts = 1
    order, waits = [], []
    for at in range(100):
        if at % 4 == 0:
            view.add("dog", 1000 + at)
        ((_, unit),) = schedule(view, [Idle("w", "dog")], 1, limits)
        order.append(unit.positions)
        waits += [at - (position - 1000) for position in unit.positions if position >= 1000]
        view.end(unit)
    assert len(waits) == 25 and max(waits) <= 1, "a newcomer waits for one unit at most"
    oldest = [position for unit in order[::2] for position in unit]
    assert oldest == list(range(100)), "every second unit is the oldest's"
    assert len({position for unit in order for position in unit}) == 200


def test_a_newcomer_of_another_known_class_starts_before_the_class_that_its_worker_has():
    view, limits = View(), Limits(unit=1, newest=True)
    for noun, positions in (("dog", range(50)), ("cat", [90])):
        for position in positions:
            view.add(noun, position)
        view.priors[noun].parts = 1
    units = [schedule(view, [Idle("w", "dog")], 1, limits)[0][1] for _ in range(2)]
    assert [(unit.class_noun, unit.positions) for unit in units] == [("dog", (0,)), ("cat", (90,))]
