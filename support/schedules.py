"""Learning rates over a training."""
import math


def scaled_rate(rate, batch_size):
    """A learning rate given for 256 images grows linearly with the batch (Goyal et al. 2017)."""
    return rate * batch_size / 256


def linear_warmup(peak, done, length):
    """Rises from 0 to the peak in a warm-up of this length; done: in the same unit."""
    return peak * done / length if done < length else peak


def cosine(done, length=1.0):
    """From 1 at the start to 0 at the end of a training of this length; done: in the same unit."""
    return (1 + math.cos(math.pi * done / length)) / 2


def step_decay(drops, done):
    """1, and a tenth of what it was from each of drops on. drops, done: fractions of the training,
    or steps."""
    return 0.1 ** sum(done >= drop for drop in drops)
