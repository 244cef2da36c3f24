"""Pairs that use hints on arrival."""

import torch

from knowledge_boosting.models.config import NetworkSize, OnArrival, Pair
from knowledge_boosting.models.pair import BoostedPair


def arrival_pair(window: int, *, running_level: bool = False) -> BoostedPair:
    """Make a tiny pair of random weights on which hints have a large effect."""
    size = NetworkSize(channels=8, hidden=8, window=window)
    config = Pair(task="ss", small=size, large=size, boosting=OnArrival(policy="arrival"), running_level=running_level)
    torch.manual_seed(0)
    pair = BoostedPair(config).eval()
    with torch.no_grad():
        for fusion in pair.small.network.fusion:
            for name in ("norm_merge.weight", "age_bias", "age_scale"):
                fusion.get_parameter(name).normal_()
    return pair
