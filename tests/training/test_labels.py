import torch

from kdfast.training.hf import shift_labels


def test_shift_moves_labels_left_and_ends_with_ignored():
    assert shift_labels(torch.tensor([[5, 6, 7], [8, -100, 9]])).tolist() == [[6, 7, -100], [-100, 9, -100]]


def test_padding_counts_for_nothing_on_either_side():
    labels = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    # row 1: the position before the first token is padding, and has nothing to predict from
    assert shift_labels(labels, mask).tolist() == [[6, 7, -100, -100], [-100, -100, 8, -100]]


def test_a_mask_of_another_rank_is_no_padding():
    labels = torch.tensor([[5, 6, 7]])
    assert shift_labels(labels, torch.zeros(1, 1, 3, 3)).tolist() == [[6, 7, -100]]


def test_labels_are_not_written():
    labels = torch.tensor([[5, 6, 7]])
    shift_labels(labels, torch.zeros(1, 3))
    assert labels.tolist() == [[5, 6, 7]]
