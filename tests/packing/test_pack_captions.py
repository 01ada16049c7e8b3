"""Captions of a pack's subjects: each has room for its own, and none runs into a neighbour's."""

from dataclasses import replace

import pytest
import torch

from dbtrain.data.index import Entry, Index
from dbtrain.packing.pack import CAPTIONS, Pack, Start, captions_room
from dbtrain.results.checkpoint import Checkpoint
from dbtrain.settings.config import DataConfig
from dbtrain.training.trainables import fresh_adapter
from dbtrain.values import Conditioning
from tests.kit.small_pack import BATCH, FAMILY, FixedBank, adapters_of, models_of
from tests.packing.test_pack import CASES, EXACT


def test_a_row_has_room_for_every_caption_of_its_subject():
    """Subjects with three captions each, in a pack and alone: no caption runs into a neighbour's."""
    cases, dtype = [replace(case, rank=2) for case in CASES[:3]], torch.float64

    def three(case, dtype):
        seed = torch.Generator().manual_seed(5 + sum(map(ord, case.name)))
        return Conditioning(torch.randn(3, 3, 5, dtype=torch.float64, generator=seed).to(dtype))

    class Three(FixedBank):
        def draw(self, step, slots):
            return replace(super().draw(step, slots), caption_B=torch.arange(2 * BATCH) % 3)

    def losses(size, members, room):
        with adapters_of(dtype):
            pack = Pack(FAMILY, models_of(dtype), members[0].config, size, 2, 12, three(cases[0], dtype), room)
        for row, case in enumerate(members):
            fresh = {"master": fresh_adapter(FAMILY, pack.models, case.config, case.name)}
            pack.seat(row, Start(case.name, case.config, three(case, dtype), Checkpoint(0, "", fresh)))
        batch = pack.batch([(row, Three(case, dtype), 0) for row, case in enumerate(members)])
        return pack.module(batch, pack.engine.step_N).per_sample_B.view(size, -1)

    together = losses(3, cases, 4)
    for row, case in enumerate(cases):
        assert (together[row] - losses(1, [case], 3)[0]).abs().max() < EXACT
    with pytest.raises(AssertionError, match="next row"):
        losses(3, cases, 2)


def test_the_room_is_that_of_the_subject_with_the_most_captions():
    shard = "train-000000.tar"
    captions = {"a": ["", "", ""], "b": ["x", "y", ""], "c": ["z"] * 4}
    entries = [
        Entry(shard, f"{name}-0-{i}", 0, 1, "", text)
        for name, texts in captions.items()
        for i, text in enumerate(texts)
    ]
    index = Index(tuple(entries), ())
    assert captions_room(index, ["a", "c"], DataConfig()) == CAPTIONS
    assert captions_room(index, ["a", "b", "c"], DataConfig()) == 4
    assert captions_room(index, ["b"], DataConfig(caption_dropout=0.1)) == 5
    assert captions_room(index, [], DataConfig()) == CAPTIONS
