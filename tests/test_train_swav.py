"""SwAV's queue: against plain NumPy, from a checkpoint, in a run.

Two processes: test_train_moco.py; SwAV without a queue: test_train_byol.py.
"""
import io
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import CPU, before_call, fail, json_lines

import train_moco
import train_swav
from support.command_line import UserError

N, QUEUE, EPSILON, T = 4, 8, 0.05, 0.1             # the queue is full after two batches of N


def make_method(**changes):
    torch.manual_seed(0)
    args = dict(arch="resnet10_narrow", image_size=32, dim=12, hidden=10, temperature=T,
                prototypes=5, epsilon=EPSILON, freeze_epochs=0, epochs=4, queue=QUEUE,
                queue_after=0)
    method = train_swav.SwAV(types.SimpleNamespace(**args | changes)).train()
    torch.nn.init.normal_(method.prototypes.weight)          # no two alike
    return method


def make_views(batches):
    """For each batch two large views, then one small."""
    return [[*torch.randn(2, N, 3, 32, 32), torch.randn(N, 3, 16, 16)] for _ in range(batches)]


def step(method, views, fraction=0.5, weights=None):
    method.update(fraction)
    return method(views, weights, CPU)[0]


def sinkhorn(scores):
    q = np.exp(scores.T / EPSILON)               # as in the paper: prototypes x images
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0) * q.shape[1]
    return (q * q.shape[1]).T


def test_by_numpy():
    """Codes of queue and batch; those of the batch are kept. The queue starts in the second epoch,
    is used from the third of its batches on, and the fourth finds the newest two in it."""
    method, batches, w = make_method(queue_after=1), make_views(5), np.array([0.4, 1.6, 1.2, 0.8])
    weights = torch.tensor(w).float()
    step(method, batches[0], fraction=0.24, weights=weights)
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(5))
    assert not method.queue.any() and method.chance == math.log(5)
    past, without = [], []
    for views in batches[1:]:
        loss = step(method, views, fraction=0.25, weights=weights).item()
        with torch.no_grad():
            z = [method.query(torch.cat(views[:2])), method.query(views[2])]
        z = F.normalize(torch.cat(z).double()).view(3, N, 12).numpy()
        c = method.prototypes.weight.detach().double().numpy()
        older = past[-2:][::-1] if len(past) >= 2 else []    # the newest first
        expected = []
        for queue in (older, []):
            total = 0.0
            for a in range(2):
                codes = sinkhorn(np.concatenate([z[a], *(x[a] for x in queue)]) @ c.T)[:N]
                for v in {0, 1, 2} - {a}:
                    p = np.exp(z[v] @ c.T / T)
                    p /= p.sum(1, keepdims=True)
                    total += -(w * (codes * np.log(p)).sum(1)).mean() / (2 * 2)
            expected.append(total)
        assert loss == pytest.approx(expected[0], abs=1e-4)
        without.append(abs(expected[0] - expected[1]))
        past.append(z)
    assert without[:2] == [0, 0] and min(without[2:]) > 1e-3
    wanted = np.concatenate([past[-1][:2], past[-2][:2]], 1)
    np.testing.assert_allclose(method.queue.numpy(), wanted, atol=1e-5)


def test_a_checkpoint_keeps_the_queue():
    method, other, *batches = make_method(), make_method(), *make_views(4)
    for views in batches[:3]:
        step(method, views)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.queue, method.queue) and other.queue.any()
    assert torch.equal(step(other, batches[3]), step(method, batches[3]))
    assert other.queue_is_full


def test_a_run_resumed_with_its_queue(image_folder, tmp_path):
    flags = ["--dataset", "folder", "--data-dir", image_folder, "--image-size", 32, "--arch",
             "resnet10_narrow", "--batch-size", 8, "--device", "cpu", "--dim", 12, "--hidden", 10,
             "--prototypes", 6, "--small-size", 16, "--small-crops", 1, "--queue", 16,
             "--queue-after", 0, "--epochs", 2, "--knn-every", 0, "--log-every", 1,
             "--save-minutes", 0]

    def run(name, *more):
        argv = [str(flag) for flag in [*flags, "--output-dir", tmp_path / name, *more]]
        train_moco.train(train_moco.parse_args(train_swav.METHODS, argv=argv), CPU,
                         train_swav.METHODS)
        return [line["loss"] for line in json_lines(tmp_path / name / "log.jsonl")]
    expected = run("whole")
    with pytest.raises(UserError):
        before_call(6, fail, lambda: run("parts"), train_moco, "train_step")()
    assert len(expected) == 6 and run("parts", "--resume") == expected


def test_scores_of_swav_are_in_single_precision(monkeypatch):
    seen, real = [], train_swav.sinkhorn
    monkeypatch.setattr(train_swav, "sinkhorn", lambda scores, *more, **options:
                        seen.append(scores.dtype) or real(scores, *more, **options))
    method, [views] = make_method(), make_views(1)
    method.update(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        method(views, None, CPU)
    assert seen == [torch.float32] * 2
