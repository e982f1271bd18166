"""Random numbers that depend on whole numbers alone, not on the past: a run can go on anywhere."""
import hashlib

import torch


def step_generator(*numbers):
    """A random generator that depends on the given whole numbers (seed, epoch, step, ...) alone."""
    digest = hashlib.sha256(str(tuple(map(int, numbers))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2 ** 63 - 1))


def epoch_order(count, seed, epoch):
    """The order in which an epoch goes through count items, (count,)."""
    return torch.randperm(count, generator=step_generator(seed, epoch))
