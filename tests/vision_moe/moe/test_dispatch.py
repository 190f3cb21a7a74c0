"""Capacity and expert choice, worked by hand; expert E, one past the last, stands for a dropped slot."""

import torch

from vision_moe.moe.dispatch import Groups, count_tokens, drop_overflow, expert_choice, group_tokens


def one_group(num_tokens):
    return group_tokens(torch.zeros(num_tokens, dtype=torch.int64), 1, None)


def test_capacity_is_the_rounded_up_share_of_the_groups_tokens():
    groups = Groups(torch.empty(0), torch.tensor([10, 3, 0, 100]))
    # 10 * 1.25 / 4 = 3.125, 3 * 1.25 / 4 = 0.9375
    assert groups.capacity(1.25 / 4).tolist()[:3] == [4, 1, 0]
    # 110.00000000000001 in floating point.
    assert groups.capacity(1.1)[3] == 110


def test_groups_are_so_many_sequences():
    row_T = torch.tensor([0, 0, 1, 3, 3, 3, 4])
    assert group_tokens(row_T, 5, 2).group_T.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert group_tokens(row_T, 5, 2).size_G.tolist() == [3, 3, 1]
    assert group_tokens(row_T, 5, None).size_G.tolist() == [7]


def test_first_choices_come_before_second_choices_and_tokens_in_their_order():
    """Two places each. Expert 0: token 0 first, then token 1's second choice; token 2's is dropped.

    Expert 1: the first choices of tokens 1 and 2; token 0's second choice is dropped.
    """
    experts_TK, gates_TK = torch.tensor([[0, 1], [1, 0], [1, 0]]), torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]])
    experts, gates = drop_overflow(experts_TK, gates_TK, 2, one_group(3), torch.tensor([2]))
    assert experts.tolist() == [[0, 2], [1, 0], [1, 2]]
    torch.testing.assert_close(gates, torch.tensor([[0.6, 0.0], [0.7, 0.3], [0.9, 0.0]]))


def test_batch_priority_lets_the_highest_gates_choose_first():
    """As above, but in the order 2, 1, 0: expert 0's second place goes to token 2."""
    experts_TK, gates_TK = torch.tensor([[0, 1], [1, 0], [1, 0]]), torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]])
    experts, gates = drop_overflow(experts_TK, gates_TK, 2, one_group(3), torch.tensor([2]), gates_TK[:, 0])
    assert experts.tolist() == [[0, 2], [1, 2], [1, 0]]
    torch.testing.assert_close(gates, torch.tensor([[0.6, 0.0], [0.7, 0.0], [0.9, 0.1]]))


def test_each_group_has_places_of_its_own():
    experts_TK, gates_TK = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    pairs = group_tokens(torch.tensor([0, 0, 1, 1]), 2, 1)
    experts, _ = drop_overflow(experts_TK, gates_TK, 2, pairs, torch.tensor([1, 1]))
    assert experts.tolist() == [[0], [2], [0], [2]]
    experts, _ = drop_overflow(experts_TK, gates_TK, 2, pairs, torch.tensor([1, 1]), torch.tensor([0.5, 0.9, 0.8, 0.6]))
    assert experts.tolist() == [[2], [0], [0], [2]]
    experts, _ = drop_overflow(experts_TK, gates_TK, 2, one_group(4), torch.tensor([1]))
    assert experts.tolist() == [[0], [2], [2], [2]]


def test_each_expert_takes_its_top_tokens():
    """Two tokens each: expert 0 takes 0 and 1, expert 1 takes 2 and 1; normalized, what one token gets sums to 1."""
    gates_TE = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    experts, gates = expert_choice(gates_TE, one_group(3), torch.tensor([2]), normalize=False)
    assert experts.tolist() == [[0, 2], [0, 1], [2, 1]]
    torch.testing.assert_close(gates, torch.tensor([[0.9, 0.0], [0.6, 0.4], [0.0, 0.8]]))
    _, normalized = expert_choice(gates_TE, one_group(3), torch.tensor([2]), normalize=True)
    torch.testing.assert_close(normalized, torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.0, 1.0]]))


def test_experts_choose_within_each_group():
    """Groups of two and one tokens with one place each: both experts take the lone token 2."""
    gates_TE = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    groups = group_tokens(torch.tensor([0, 0, 1]), 2, 1)
    experts, _ = expert_choice(gates_TE, groups, torch.tensor([1, 1]), normalize=False)
    assert experts.tolist() == [[0, 2], [2, 1], [0, 1]]


def test_a_token_that_no_expert_takes_has_finite_normalized_gates_and_gradients():
    gates_TE = torch.tensor([[0.9, 0.8], [0.1, 0.2]], requires_grad=True)
    experts, gates = expert_choice(gates_TE, one_group(2), torch.tensor([1]), normalize=True)
    assert experts.tolist() == [[0, 1], [2, 2]]
    assert gates[1].tolist() == [0.0, 0.0]
    gates.square().sum().backward()
    assert gates_TE.grad.isfinite().all()


def test_no_tokens_are_dispatched_to_nobody():
    groups = one_group(0)
    empty = torch.empty(0, 2)
    assert drop_overflow(empty.long(), empty, 2, groups, groups.capacity(1.0))[0].shape == (0, 2)
    assert expert_choice(empty, groups, groups.capacity(1.0), normalize=True)[0].shape == (0, 2)


def test_dropped_slots_count_for_no_expert():
    assert count_tokens(torch.tensor([[0, 2], [2, 3], [0, 3]]), 3).tolist() == [2, 0, 2]
