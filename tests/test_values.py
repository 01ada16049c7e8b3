"""The values that cross borders: tensors move and are indexed together, ids stay safe as names of folders."""

import pytest
import torch

from dbtrain.values import SUBJECT_ID, Batch, Conditioning, sent_together


def batch(count):
    numbers = torch.arange(count)
    return Batch(torch.rand(count, 8, 2, 2), numbers, numbers % 2, numbers, torch.ones(count, 6))


def test_all_tensors_are_indexed_together_and_absent_ones_stay_absent():
    whole = batch(4)
    part = whole[torch.tensor([2, 0])]
    assert part.slot_B.tolist() == part.caption_B.tolist() == [2, 0]
    assert torch.equal(part.images_BCHW, whole.images_BCHW[[2, 0]]) and part.subject_B is None
    assert type(part) is Batch


def test_all_tensors_are_moved_together():
    moved = Conditioning(torch.ones(1, 2, 3), torch.ones(1, 3)).to(torch.float64)
    assert (moved.states_BTD.dtype, moved.pooled_BD.dtype) == (torch.float64, torch.float64)
    assert batch(2).to("meta").size_B6.device.type == "meta"


def test_tensors_that_are_sent_together_are_views_of_one_buffer():
    tensors = [torch.rand(3, 5), torch.arange(7), torch.tensor([True, False, True]), torch.zeros(0, 4)]
    sent = sent_together(tensors, "cpu")
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(sent, tensors))
    assert len({one.untyped_storage().data_ptr() for one in sent}) == 1
    assert all(one.data_ptr() % 16 == 0 for one in sent)


@pytest.mark.parametrize("name", ["rex", "9", "a_b-9", "x" * 64])
def test_good_ids(name):
    assert SUBJECT_ID.fullmatch(name)


@pytest.mark.parametrize("name", ["", "x" * 65, "../x", ".x", "-x", "é", "a b", "x\n"])
def test_ids_that_are_no_names_of_folders(name):
    assert not SUBJECT_ID.fullmatch(name)
