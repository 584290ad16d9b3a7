"""Blocks of columns taken out one by one, against plain least squares and brute force."""

from itertools import combinations

import numpy as np
import pytest

from onnxq.kernels.importance import RIDGE, Reader, eliminate


def reader(outputs=5, blocks=6, each=1, seed=0):
    """A reader whose columns hang together, its blocks' columns scattered."""
    rng = np.random.default_rng(seed)
    size = blocks * each
    mixed = rng.normal(size=(400, size)) @ rng.normal(size=(size, size))
    rows, gram = rng.normal(size=(outputs, size)), mixed.T @ mixed / 400
    columns = rng.permutation(size).reshape(blocks, each)
    return Reader(rows, gram, columns, float(np.trace(rows @ gram @ rows.T)))


def ridged(gram):
    """H with the share of the diagonal that the kernel adds to it."""
    diagonal = np.diag(gram)
    return gram + RIDGE * np.diag(diagonal + 1e-3 * diagonal.mean())


def cost(one, gone):
    """The least relative error of the output without some blocks, by solving for the rest."""
    H = ridged(one.gram)
    kept = np.setdiff1d(np.arange(len(H)), one.blocks[[*gone]])
    V = np.linalg.solve(H[np.ix_(kept, kept)], H[kept] @ one.rows.T).T
    missed = one.rows.copy()
    missed[:, kept] -= V
    return float(np.trace(missed @ H @ missed.T)) / one.power


@pytest.mark.parametrize("each", [1, 3])
def test_costs_are_those_of_least_squares(each):
    one = reader(each=each)
    order, costs = eliminate([one])
    assert sorted(order.tolist()) == [*range(6)]
    wanted = [cost(one, order[: n + 1]) for n in range(6)]
    np.testing.assert_allclose(costs, wanted, 1e-6)


@pytest.mark.parametrize("each", [1, 4])
def test_each_step_takes_out_what_costs_least(each):
    one = reader(each=each, seed=1)
    order, _ = eliminate([one])
    for n in range(6):
        left = [b for b in range(6) if b not in order[:n]]
        costs = {b: cost(one, [*order[:n], b]) for b in left}
        assert order[n] == min(costs, key=costs.get)


def test_the_greedy_choice_is_near_the_best_of_all():
    ratios = []
    for seed in range(10):
        one = reader(blocks=8, seed=seed)
        order, costs = eliminate([one], 4)
        assert order.size == 4
        ratios.append(costs[-1] / min(cost(one, gone) for gone in combinations(range(8), 4)))
    assert np.median(ratios) < 1.05
    assert max(ratios) < 2.0


def test_readers_add_up_as_shares_of_their_power():
    one, other = reader(seed=2), reader(outputs=3, each=2, seed=3)
    order, costs = eliminate([one, other], 2)
    assert costs[-1] == pytest.approx(cost(one, order) + cost(other, order), 1e-6)
    loud = Reader(one.rows * 100, one.gram, one.blocks, one.power * 1e4)
    np.testing.assert_array_equal(eliminate([loud, other], 2)[0], order)


def test_copies_go_one_at_a_time():
    # of many blocks several go at once, but never both of two that make up for one another
    rng = np.random.default_rng(4)
    half = rng.normal(size=(1000, 60))
    both = np.concatenate([half, half], axis=1)
    rows, gram = rng.normal(size=(7, 120)), both.T @ both / 1000
    one = Reader(rows, gram, np.arange(120)[:, None], float(np.trace(rows @ gram @ rows.T)))
    order, costs = eliminate([one], 60)
    assert sorted((order % 60).tolist()) == [*range(60)]
    assert costs[-1] < 1e-2


def test_several_at_once_cost_no_less_than_they_do():
    one = reader(blocks=120, seed=5)
    order, costs = eliminate([one], 20)
    assert costs[-1] == pytest.approx(cost(one, order), 1e-4)


def test_what_is_not_read_and_what_never_moves_goes_first():
    one = reader(seed=6)
    rows, gram = one.rows.copy(), one.gram.copy()
    rows[:, one.blocks[4]] = 0.0
    gram[one.blocks[2]] = gram[:, one.blocks[2]] = 0.0
    order, costs = eliminate([Reader(rows, gram, one.blocks, one.power)])
    assert set(order[:2].tolist()) == {2, 4}
    np.testing.assert_allclose(costs[:2], 0.0, atol=1e-6)


def test_nothing_to_take_out():
    order, costs = eliminate([reader()], 6)
    assert order.size == costs.size == 0


def test_an_input_of_zeros():
    silent = Reader(np.ones((2, 4)), np.zeros((4, 4)), np.arange(4)[:, None], 0.0)
    order, costs = eliminate([silent])
    assert order.tolist() == [0, 1, 2, 3]
    assert not costs.any()
