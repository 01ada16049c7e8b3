import dataclasses
import hashlib
import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbtrain.data.index import INDEX_NAME, Index, make_key, order, split_key
from dbtrain.engines.engine import plan_batches
from dbtrain.engines.world import World
from dbtrain.errors import DataError
from dbtrain.values import Role

COUNTS = st.integers(1, 12)


@settings(max_examples=60, deadline=None)
@given(count=COUNTS, epochs=st.integers(1, 4), seed=st.integers(0, 2**63 - 1), role=st.sampled_from(Role))
def test_every_epoch_draws_every_sample_exactly_once(count, epochs, seed, role):
    drawn = order(count, 0, count * epochs, seed, "cat", role)
    for epoch in range(epochs):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


@settings(max_examples=60, deadline=None)
@given(count=COUNTS, start=st.integers(0, 50), n=st.integers(0, 50), seed=st.integers(0, 9))
def test_order_is_one_sequence_wherever_it_is_entered(count, start, n, seed):
    assert order(count, start, n, seed, "cat") == order(count, 0, start + n, seed, "cat")[start:]


def test_order_is_shuffled_by_seed_subject_role_and_epoch():
    count = 12
    base = order(count, 0, count, 0, "cat")
    others = [
        list(range(count)),
        order(count, 0, count, 1, "cat"),
        order(count, 0, count, 0, "dog"),
        order(count, 0, count, 0, "cat", Role.PRIOR),
        order(count, count, count, 0, "cat"),
    ]
    assert all(base != other for other in others)


def test_every_sample_comes_first_in_some_epoch():
    firsts = [order(4, 4 * epoch, 1, 0, "cat")[0] for epoch in range(200)]
    assert all(25 <= firsts.count(sample) <= 80 for sample in range(4))  # 50 expected, sd 6


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 9),
    data=st.data(),
    turns=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4),
)
def test_every_photo_is_used_exactly_once_an_epoch_though_ranks_come_and_go(count, data, turns):
    """Each turn runs some steps at another number of ranks and accumulation; together they draw the one sequence."""
    batch = math.lcm(*(ranks * parts for ranks, parts, _ in turns))
    used, step = [], 0
    for ranks, parts, steps in turns:
        plan = plan_batches(batch, batch // ranks // parts, ranks)
        for _ in range(steps):
            slots = [
                step * batch + slot
                for turn in range(plan.accumulation)
                for rank in range(ranks)
                for slot in plan.slots(World(rank, ranks, "cpu"), turn)
            ]
            used += [order(count, slot, 1, 7, "rex")[0] for slot in data.draw(st.permutations(slots))]
            assert sorted(slots) == list(range(step * batch, (step + 1) * batch))
            step += 1
    epochs, rest = divmod(len(used), count)
    assert set(Counter(used).values()) <= {epochs, epochs + bool(rest)}


def test_nothing_to_draw_from_is_an_error():
    with pytest.raises(DataError, match="no prior samples"):
        order(0, 0, 1, 0, "cat", Role.PRIOR)


def test_keys_survive_ids_that_look_like_keys():
    assert split_key(make_key("cat-0-1", Role.PRIOR, 12)) == ("cat-0-1", Role.PRIOR, 12)
    for bad in ("cat", "cat-2-0", "cat-0-01", "a.b-0-0", "../a-0-0", "cat-0-0\n", "cat-0--1"):
        with pytest.raises(ValueError, match="no sample key"):
            split_key(bad)


def test_index_comes_back_equal(shard_folder):
    index = Index.load(shard_folder)
    assert index.to_bytes() == (shard_folder / INDEX_NAME).read_bytes()
    assert index.subjects == ("cat-0", "cat-1", "cat-2")
    assert [entry.key for entry in index.entries_of("cat-1")] == ["cat-1-0-0", "cat-1-0-1", "cat-1-0-2", "cat-1-0-3"]
    assert index.entries_of("cat-1", Role.PRIOR) == ()
    assert index.entries[5].caption == "a photo of {identifier} 1é"


def change_entry(index, number, **values):
    entries = list(index.entries)
    entries[number] = dataclasses.replace(entries[number], **values)
    return dataclasses.replace(index, entries=tuple(entries))


def change_shard(index, **values):
    return dataclasses.replace(index, shards=(dataclasses.replace(index.shards[0], **values), *index.shards[1:]))


CONTRADICTIONS = {
    "repeated key": lambda i: change_entry(i, 1, key=i.entries[0].key),
    "unsafe key": lambda i: change_entry(i, 1, key="../x-0-0"),
    "dotted key": lambda i: change_entry(i, 1, key="v1.0-0-0"),
    "no digest": lambda i: change_entry(i, 1, sha256=""),
    "gap": lambda i: change_entry(i, 1, offset=i.entries[1].offset + 512),
    "negative length": lambda i: change_entry(i, 1, length=-512),
    "text for a number": lambda i: change_entry(i, 1, offset="0"),
    "fraction for a number": lambda i: change_entry(i, 1, offset=float(i.entries[1].offset)),
    "fraction for a length": lambda i: change_entry(i, 1, length=float(i.entries[1].length)),
    "fraction for a size": lambda i: change_shard(i, size=float(i.shards[0].size)),
    "missing entry": lambda i: dataclasses.replace(i, entries=i.entries[:-1]),
    "fewer in a shard": lambda i: change_shard(i, count=i.shards[0].count - 1),
    "size": lambda i: change_shard(i, size=i.shards[0].size + 512),
    "shard digest": lambda i: change_shard(i, sha256="0" * 63),
    "repeated shard": lambda i: dataclasses.replace(i, shards=(*i.shards, i.shards[0])),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_an_index_at_odds_with_itself_is_refused_though_its_digest_is_right(shard_folder, tmp_path, name):
    CONTRADICTIONS[name](Index.load(shard_folder)).save(tmp_path)
    with pytest.raises(DataError, match=r"index\.jsonl: is damaged"):
        Index.load(tmp_path)


@pytest.mark.parametrize("shard", [99, -99, None, "0", True])
def test_a_row_of_no_shard_is_refused_though_the_digest_is_right(shard_folder, tmp_path, shard):
    body = (shard_folder / INDEX_NAME).read_bytes().splitlines(keepends=True)[:-1]
    entry = json.loads(body[3])
    body[3] = json.dumps([shard, *entry[1:]]).encode() + b"\n"
    digest = hashlib.sha256(b"".join(body)).hexdigest()
    (tmp_path / INDEX_NAME).write_bytes(b"".join(body) + f'{{"sha256":"{digest}"}}\n'.encode())
    with pytest.raises(DataError, match=r"index\.jsonl: is damaged"):
        Index.load(tmp_path)


@pytest.mark.parametrize("shard", ["../train-000000.tar", "/etc/passwd", "pipe:cat", "train-000000.tar/x"])
def test_unsafe_shard_names_are_refused(shard_folder, tmp_path, shard):
    index = Index.load(shard_folder)
    first = index.shards[0].name
    renamed = (dataclasses.replace(one, shard=shard) if one.shard == first else one for one in index.entries)
    change_shard(dataclasses.replace(index, entries=tuple(renamed)), name=shard).save(tmp_path)
    with pytest.raises(DataError, match="unsafe name"):
        Index.load(tmp_path)


def test_missing_empty_foreign_and_future_indexes_are_named(tmp_path, shard_folder):
    with pytest.raises(DataError, match="cannot be read"):
        Index.load(tmp_path)
    for content in (b"", b"\n", b"{}", b"\xff" * 100, json.dumps({"sha256": "0" * 64}).encode()):
        (tmp_path / INDEX_NAME).write_bytes(content)
        with pytest.raises(DataError, match="its digest differs"):
            Index.load(tmp_path)
    for address in ("pipe:cat /etc/passwd", "https://example.org/x", "s3://bucket"):
        with pytest.raises(DataError, match="address"):
            Index.load(address)
