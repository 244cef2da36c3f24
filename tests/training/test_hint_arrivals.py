"""Tests for the simulated arrival of hints in training."""

import numpy as np
import torch

from knowledge_boosting.common.links import NetworkConditions
from knowledge_boosting.models.arrival_fusion import NEVER
from knowledge_boosting.models.arrivals import MERGES
from knowledge_boosting.training.data.hint_arrivals import draw_arrivals, simulate_arrivals
from tests.arrivals import arrival_pair

WINDOW, FRAMES = 64, 500
MODEL = arrival_pair(WINDOW).config


def test_hints_of_a_constant_delay_are_used_from_the_next_frame_on() -> None:
    ready_at = simulate_arrivals(NetworkConditions(delay_ms=48), 0, FRAMES, MODEL, unheard=range(100, 120))
    ages = ready_at - torch.arange(FRAMES)
    heard = [frame for frame in range(FRAMES - 7) if not 100 <= frame < 120]
    assert set(ages[heard].tolist()) == {7}  # 48 ms of the links and 4 ms of the server
    assert (ready_at[100:120] == NEVER).all()


def test_hints_that_are_older_than_the_window_are_not_used() -> None:
    assert (simulate_arrivals(NetworkConditions(delay_ms=600), 0, FRAMES, MODEL) == NEVER).all()


def test_draws_cover_all_networks() -> None:
    rng = np.random.default_rng(0)
    medians, shares = [], []
    for _ in range(100):
        ready_at = draw_arrivals(rng, FRAMES, MODEL)
        used = ready_at != NEVER
        ages = (ready_at - torch.arange(FRAMES))[used]
        assert ages.min() >= 1
        assert ages.max() <= WINDOW
        assert torch.bincount(ready_at[used]).max() <= MERGES
        medians.append(float(ages.float().median()))
        shares.append(float(used.float().mean()))
    assert min(medians) < 4
    assert max(medians) > 14
    # Outages and losses leave many hints out, but most draws have nearly all.
    assert min(shares) < 0.7
    assert np.median(shares) > 0.9
    again = np.random.default_rng(0)
    assert torch.equal(draw_arrivals(again, FRAMES, MODEL), draw_arrivals(np.random.default_rng(0), FRAMES, MODEL))
