"""MoCo v2 and v3: the step against one process and by hand, runs as a user makes them, refusals."""
import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from running import CPU, before_call, end, fail, json_lines, refusal, start_two

import shapes
import train_byol
import train_moco
import train_swav
from quality_loss import info_nce, pair_quality, quality_weights
from support import runs
from support.command_line import UserError
from support.data import Images
from support.networks import LARS
from support.processes import setup

METHODS = train_moco.METHODS | train_byol.METHODS | train_swav.METHODS


def settings(method="mocov2", **changes):
    args = dict(method=method, arch="resnet10_narrow", image_size=32, dim=16, queue=16, hidden=32,
                temperature=0.2, momentum=0.9, batch_size=8, optimizer="sgd", lr=0.05 * 32,
                weight_decay=1e-4, warmup_epochs=0, epochs=1, prototypes=6, epsilon=0.05,
                freeze_epochs=0, queue_after=0, final_lr=None)
    return types.SimpleNamespace(**args | changes)


# -------------------------------------------------------------------------------------- the step
def two_steps(name, world):
    """Two weighted steps on fixed views; returns losses, weights, first gradients, final state.

    In float64, against rounding; batch norm by running statistics: PyTorch synchronises those of a
    batch on GPUs only."""
    torch.manual_seed(0)
    queue = 8 if name == "swav" else 16                     # SwAV's is used once it is full
    method = METHODS[name](settings(name, queue=queue)).double().train()
    for module in method.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    if name in ("mocov2", "swav"):
        method.queue = method.queue.float()                  # the loss takes float32
    features = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 8, 8), torch.nn.Flatten(2)).double()
    views = list(torch.randn(2, 2, 8, 3, 32, 32).double())   # each (steps, N, 3, S, S)
    if name == "swav":
        views += torch.randn(2, 2, 8, 3, 16, 16).double()
    component = torch.randn(6)
    share = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
    seen_weights = []

    def quality_of(a, b):
        quality = pair_quality(features(a).mT, features(b).mT, component)
        seen_weights.append(quality_weights(quality[0], 1.0, world.group))
        return tuple(q.detach() for q in quality)
    wrapped = method
    if world.size > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
    optimizer = train_moco.make_optimizer(method, "sgd", 1e-4)
    optimizer.param_groups[0]["lr"] = 0.05
    losses, gradients = [], None
    for step in range(2):
        readouts = train_moco.train_step(wrapped, optimizer, [v[step, share] for v in views],
                                         quality_of, 1.0, step / 2, world)
        losses.append(readouts["loss"])
        gradients = gradients or [p.grad.clone() for p in method.parameters() if p.grad is not None]
    return {"losses": world.mean(torch.stack(losses)), "gradients": gradients,
            "weights": [world.gather(w) for w in seen_weights],
            "state": [v.detach().clone() for v in method.state_dict().values()]}


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """What each of two processes gets: {method: results of two_steps} by rank."""
    folder = tmp_path_factory.mktemp("two")

    def work():
        world = setup("cpu")._replace(dtype=torch.float32)
        torch.save({name: two_steps(name, world) for name in METHODS}, folder / f"{world.rank}.pt")
    assert end(*start_two([work] * 2, folder)) == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(name, of_two_processes):
    """Half the batch each, weights normalised over both: loss, weights, gradients and state of
    one process."""
    expected = two_steps(name, CPU)
    assert expected["losses"].std() > 0 and expected["weights"][0].std() > 0.01    # not constants
    for got in of_two_processes:
        torch.testing.assert_close(got[name]["losses"], expected["losses"], atol=1e-5, rtol=1e-5)
        for key in ("weights", "gradients", "state"):
            assert len(expected[key]) > 0
            torch.testing.assert_close(got[name][key], expected[key], atol=1e-5, rtol=1e-4)


def float16_world(scale):
    return CPU._replace(dtype=torch.float16, scaler=torch.amp.GradScaler("cpu", init_scale=scale))


def test_float16_learns_what_float32_learns():
    """12 steps: each loss within 2%, although gradients are scaled; the optimizer's are not."""
    losses, views = {}, torch.randn(12, 2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for world in (CPU, float16_world(2.0 ** 10)):
        torch.manual_seed(0)
        method = train_moco.MoCoV2(settings()).train()
        optimizer = train_moco.make_optimizer(method, "sgd", 1e-4)
        optimizer.param_groups[0]["lr"] = 0.01
        losses[world.dtype] = torch.stack([train_moco.train_step(
            method, optimizer, pair, None, 1.0, 0.0, world)["loss"] for pair in views])
    torch.testing.assert_close(losses[torch.float16], losses[torch.float32], rtol=0.02, atol=0)
    assert losses[torch.float32].std() > 0.02


def test_an_infinite_gradient_skips_the_step():
    """The weights stay, and the next loss is scaled by half."""
    method, world = train_moco.MoCoV2(settings()).train(), float16_world(2.0 ** 126)
    optimizer = train_moco.make_optimizer(method, "sgd", 1e-4)
    optimizer.param_groups[0]["lr"] = 0.01
    before = [p.clone() for p in method.query.parameters()]
    views = list(torch.randn(2, 8, 3, 32, 32))
    train_moco.train_step(method, optimizer, views, None, 1.0, 0.0, world)
    assert all(map(torch.equal, before, method.query.parameters()))
    assert world.scaler.get_scale() == 2.0 ** 125


def test_v2_step_by_hand():
    """InfoNCE of normalised embeddings against the queue as it was; then the keys come in front,
    and the oldest fall out."""
    torch.manual_seed(0)
    method = train_moco.MoCoV2(settings()).train()
    queue, view1, view2 = method.queue.clone(), *torch.randn(2, 8, 3, 32, 32)
    w = torch.arange(8.0) / 3.5
    k = F.normalize(method.key(view2), dim=1)
    loss, _ = method((view1, view2), w, CPU)
    q = F.normalize(method.query(view1), dim=1)              # same batch statistics as in the call
    torch.testing.assert_close(loss, info_nce(q, k, queue, temperature=0.2, weights=w))
    torch.testing.assert_close(method.queue[:8], k)
    assert torch.equal(method.queue[8:], queue[:8]) and len(queue) == 16
    before = method.queue
    method((view1, view2), None, CPU)
    assert torch.equal(method.queue[8:], before[:8]) and len(method.queue) == 16
    assert not any(p.requires_grad for p in method.key.parameters())


def test_keys_of_v2_do_not_depend_on_the_batch():
    """No leak of batch statistics: in training mode a key is the same alone and in a batch."""
    torch.manual_seed(0)
    method = train_moco.MoCoV2(settings()).train()
    views = torch.randn(8, 3, 32, 32)
    together, alone = method.key(views)[:1], method.key(views[:1])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    alone = method.query(views[:2])                          # the query's do depend on it
    assert (method.query(views)[:2] - alone).abs().max() > 1e-3


def test_v3_step_by_hand():
    """Both directions with one w, 2t in front, keys of the momentum encoder; plain loops."""
    torch.manual_seed(0)
    method = train_moco.MoCoV3(settings("mocov3")).train()
    with torch.no_grad():
        for p in method.key.parameters():                    # unlike the query encoder's
            p.add_(torch.randn_like(p) * p.std())
    view1, view2 = torch.randn(2, 8, 3, 32, 32)
    w = quality_weights(torch.randn(8))
    loss, _ = method((view1, view2), w, CPU)

    def norm(x):
        return F.normalize(x, dim=1).detach().double().numpy()
    q1, q2 = (norm(method.predictor(method.query(v))) for v in (view1, view2))
    k1, k2 = (norm(method.key(v)) for v in (view1, view2))
    total = 0.0
    for q, k in ((q1, k2), (q2, k1)):
        for i in range(8):
            exps = [math.exp(q[i] @ k[j] / 0.2) for j in range(8)]
            total += w[i].item() * -math.log(exps[i] / sum(exps))
    assert loss.item() == pytest.approx(2 * 0.2 * total / 8, abs=1e-4)


def test_momentum_update():
    """Weights and statistics follow; v2's momentum is constant, v3's and BYOL's rises to 1."""
    method = train_moco.MoCoV2(settings())
    with torch.no_grad():
        for p in method.query.parameters():
            p.add_(1.0)
        method.query.backbone[1].running_mean.add_(1.0)
    before = method.key.backbone[0].weight.clone()
    method.update(0.5)                                       # m = 0.9
    torch.testing.assert_close(method.key.backbone[0].weight, before + 0.1)
    torch.testing.assert_close(method.key.backbone[1].running_mean, torch.full((16,), 0.1))
    for kind in (train_moco.MoCoV3, train_byol.BYOL):
        method = kind(settings(momentum=0.99))
        assert [round(method.momentum_at(p), 6) for p in (0, 0.5, 1)] == [0.99, 0.995, 1.0]
        assert not any(p.requires_grad for p in method.key.parameters())


def test_mocov3_with_a_vision_transformer(image_folder, tmp_path):
    """Its own recipe, a projector of three layers, a predictor that ends in a norm; positions and
    patch projection do not learn."""
    args = parse(*small(image_folder, tmp_path / "run", "--method", "mocov3", "--arch",
                        "vit_narrow", "--hidden", 16, "--dim", 12, "--warmup-epochs", 0, "--lr",
                        0.01, "--knn-every", 0))
    assert (args.optimizer, args.weight_decay, args.crop_min) == ("adamw", 0.1, 0.08)
    torch.manual_seed(args.seed)
    method = train_moco.MoCoV3(args)
    optimizer = train_moco.make_optimizer(method, args.optimizer, args.weight_decay)
    assert isinstance(optimizer, torch.optim.AdamW)
    nets = method.query.head, method.predictor
    sizes = [[(m.in_features, m.out_features) for m in net if isinstance(m, torch.nn.Linear)]
             for net in nets]
    assert sizes == [[(96, 16), (16, 16), (16, 12)], [(12, 16), (16, 12)]]
    assert all(isinstance(net[-1], torch.nn.BatchNorm1d) for net in nets)
    before = method.query.backbone.state_dict()
    train_moco.train(args, CPU)
    after = torch.load(tmp_path / "run/backbone.pt", weights_only=True)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias"}


def test_compiled_is_the_same(monkeypatch):
    """--compile: the same loss and gradients, but for rounding."""
    compiler = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",          # this backend needs no C compiler
                        lambda net: compiler(net, backend="eager"))
    torch.manual_seed(0)
    method, twin = (train_moco.MoCoV3(settings("mocov3")).train() for _ in range(2))
    twin.load_state_dict(method.state_dict())
    args = settings("mocov3", compile=True, start_batches=0)
    assert train_moco.make_ready(twin, None, args, CPU, fresh=True) is twin
    assert twin.query._compiled_call_impl and not method.query._compiled_call_impl
    views = torch.randn(2, 4, 3, 16, 16)
    losses = [net(views, None, CPU)[0] for net in (method, twin)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    gradients = [[p.grad for p in net.parameters() if p.requires_grad] for net in (method, twin)]
    assert None not in gradients[0]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_which_methods_begin_with_empty_blocks():
    """These set the last norm of each residual block to 0, MoCo v2 and SwAV do not."""
    backbones = {name: method(settings(name, arch="resnet18")).query.backbone
                 for name, method in METHODS.items()}
    empty = {name for name, net in backbones.items() if not net.layer1[0].bn2.weight.any()}
    assert empty == {"mocov3", "byol", "simsiam"}


def test_spread_tells_a_collapse():
    z = F.normalize(torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    spreads = [train_moco.health(z, z, z, embeddings)["std"]
               for embeddings in (z, z[:1].expand(1000, -1))]
    assert spreads == pytest.approx([1, 0], abs=0.02)


def test_start_gives_the_keys_true_statistics():
    torch.manual_seed(0)
    method = train_moco.MoCoV2(settings())
    batches = list(3 + 2 * torch.randn(3, 8, 3, 32, 32))
    method.train().init_batch_norm([[views, None] for views in batches])
    convolution, norm = method.query.backbone[:2]            # what the first batch norm sees
    mean = torch.stack([convolution(views).detach().mean((0, 2, 3)) for views in batches]).mean(0)
    torch.testing.assert_close(method.key.backbone[1].running_mean, mean, atol=1e-5, rtol=1e-4)
    for a, b in zip(method.key.state_dict().values(), method.query.state_dict().values(),
                    strict=True):
        assert torch.equal(a, b)
    assert norm.momentum == 0.1 and not method.key.training


def test_learning_rate_and_lars():
    def rates(*epochs, end=0.0):
        return [train_moco.learning_rate(epoch, 10, 2, 0.6, end) for epoch in epochs]
    assert rates(0, 1, 2, 6, 10) == pytest.approx([0, 0.3, 0.6, 0.3, 0])
    assert rates(2, 6, 10, end=0.2) == pytest.approx([0.6, 0.4, 0.2])
    w, b = (torch.nn.Parameter(torch.tensor(x)) for x in ([[3.0, 4.0]], [1.0]))
    optimizer = LARS([w, b], lr=0.5, weight_decay=0.1)
    for _ in range(2):
        w.grad, b.grad = torch.tensor([[0.6, 0.8]]), torch.tensor([2.0])
        optimizer.step()
    # By hand: update = g + 0.1 w is parallel to w, so its length after scaling is
    # 0.001 |w| = 0.005, then 0.001 |w'|. The bias has plain momentum.
    length = 5 - 0.5 * 0.005
    length -= 0.5 * (0.9 * 0.005 + 0.001 * length)
    torch.testing.assert_close(w.data, torch.tensor([[0.6, 0.8]]) * length)
    torch.testing.assert_close(b.data, torch.tensor([1.0 - 0.5 * 2 - 0.5 * (0.9 * 2 + 2)]))


# ------------------------------------------------------------------------------ runs, as a user
def parse(*flags):
    return train_moco.parse_args(argv=[str(f) for f in flags])


def run(*flags):
    """A run in this process: a new one would need seconds to import."""
    train_moco.train(parse(*flags), CPU)


def small(image_folder, output, *more):
    v2 = [] if "mocov3" in more else ["--queue", 16, "--start-batches", 0]
    return ["--dataset", "folder", "--data-dir", image_folder, "--image-size", 32, "--arch",
            "resnet10_narrow", "--batch-size", 8, *v2, "--epochs", 2, "--views-dir", "none",
            "--output-dir", output, *more]


def test_shapes_without_a_download(shapes_encoder, tmp_path, monkeypatch, capsys):
    """With a frozen encoder that was trained briefly; see test_shapes.py."""
    split = shapes.split
    monkeypatch.setattr(shapes, "train_encoder", lambda **options: shapes_encoder)
    monkeypatch.setattr(shapes, "split", lambda name: shapes.Scene(*(x[:512] for x in split(name))))
    run("--dataset", "shapes", "--limit", 512, "--epochs", 1, "--output-dir", tmp_path)
    last = r"kNN top-1 \d+\.\d% \(MoCo v2 \+ GenView's views \+ quality weights\)"
    assert re.fullmatch(last, capsys.readouterr().out.splitlines()[-1])
    assert {f.name for f in tmp_path.iterdir()} == {
        "last.pt", "backbone.pt", "log.jsonl", "args.json", "pairs.png", "component.npy"}
    line, *_ = json_lines(tmp_path / "log.jsonl")
    assert {"loss", "chance", "pos", "neg", "ess", "images_per_s"} <= line.keys()
    assert 0 < line["ess"] <= 1


def test_genview_on_a_folder(image_folder, views_folder, encoder_folder, tmp_path, capsys):
    """Images, views and the frozen encoder from files; backbone.pt fits torchvision's network."""
    run(*small(image_folder, tmp_path / "run", "--views-dir", views_folder, "--encoder",
               encoder_folder, "--arch", "resnet18", "--lr", 0.01, "--epochs", 1, "--batch-size",
               12, "--queue", 24, "--knn-every", 0))
    said = capsys.readouterr().out
    assert "generated views of 20 of 24 images" in said and "the other 4 use themselves" in said
    state = torch.load(tmp_path / "run/backbone.pt", weights_only=True)
    network = torchvision.models.resnet18()
    network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)        # for small pictures
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    picture = Image.open(tmp_path / "run/pairs.png").convert("RGB")
    assert picture.width > picture.height > 100 and len(picture.getcolors(10 ** 6)) > 50


@pytest.fixture(scope="module", autouse=True)
def by_a_user(image_folder, tmp_path_factory):
    """A training in a process of its own, while the tests go on; and where it works."""
    command = [sys.executable, train_moco.__file__, "--dataset", "cifar10", "--data-dir",
               image_folder, "--batch-size=8", "--queue=16", "--epochs=1", "--arch=resnet10_narrow"]
    folder = tmp_path_factory.mktemp("user")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          cwd=folder) as process:
        yield process, folder
        process.terminate()                        # where its test was not chosen


def test_called_as_a_user_it_makes_views_and_is_genview(by_a_user):
    """By the miniature: folder's name, settings, last line."""
    process, folder = by_a_user
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert "24 views made, 0 there already" in said
    last = r"kNN top-1 \d+\.\d% \(MoCo v2 \+ GenView's views \+ quality weights\)"
    assert re.fullmatch(last, said.splitlines()[-1])
    run_folder, = (folder / "runs").iterdir()
    assert run_folder.name.startswith("cifar10-mocov2-genview-")
    label = json.loads((run_folder / "args.json").read_text())["label"]
    assert label == "MoCo v2 + GenView's views + quality weights"


# -------------------------------------------------------------------------------------- refusals
@pytest.fixture(scope="module")
def wrong(views_folder, encoder_folder, tmp_path_factory):
    """Files that do not fit, and the folders of the valid ones, by name."""
    folder = tmp_path_factory.mktemp("wrong")
    np.savez(folder / "seven.npz", component=np.ones(7, np.float32), threshold=0.0)
    shutil.copytree(views_folder, folder / "others")
    source = '{"dataset": "imagenet", "source": "9 images, names 0"}'
    (folder / "others/settings.json").write_text(source)
    (folder / "cifar/train").mkdir(parents=True)
    shutil.copy(next(views_folder.rglob("*.png")), folder / "cifar/train/00000.png")
    return {"empty": folder, "seven": folder / "seven.npz", "clip": encoder_folder,
            "config": f"{encoder_folder}/config.json",
            **{name: folder / name for name in ("others", "nowhere", "cifar")}}


@pytest.mark.parametrize("flags, message", [
    ("--queue 20", "--queue 20 is no multiple of --batch-size 8"),
    ("--views-dir {nowhere}", "nowhere is no folder"),
    ("--views-dir {clip}", "holds no views of these images"),
    ("--views-dir {cifar}", "holds no views of these images"),
    ("--views-dir {others}", "made for imagenet"),
    ("--views extra", "--views extra needs images"),
    ("--batch-size 64 --queue 64", "24 images do not fill one batch of 64"),
    ("--batch-size 1 --queue 1", "batch normalisation needs two images"),
    ("--data-dir {empty}", "needs train/"),
    ("--arch resnet99", "--arch resnet99 is not supported"),
    ("--noise 100", "for other data generate_views.py sets it"),
    ("--temperature 0", "--temperature: 0 must be from 0.0001"),
    ("--quality cached", "invalid choice: 'cached'"),
    ("--hidden 32", "--hidden is not a setting of mocov2 with --dataset folder"),
    ("--resume {nowhere}/last.pt", "last.pt cannot be loaded as a checkpoint"),
    ("--quality exact --encoder {nowhere}", "nowhere could not be loaded"),
    ("--quality exact --encoder {clip} --component {config}", "is no component file"),
    ("--quality exact --encoder {clip} --component {seven}",
     "a component of 7 numbers, the encoder's features have 32")])
def test_refused_settings(flags, message, image_folder, wrong, tmp_path, capsys):
    """What the user got wrong: one line that names it, and nothing is written."""
    more = flags.format(**wrong).split()
    assert message in refusal(capsys, run, *small(image_folder, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_a_batch_that_three_processes_cannot_share(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = refusal(capsys, run, *small(image_folder, tmp_path / "run"))
    assert "cannot be divided among 3 processes" in line and not (tmp_path / "run").exists()


def test_a_download_without_network(tmp_path, capsys, monkeypatch):
    """What to put where, and that shapes needs none."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    line = refusal(capsys, run, "--dataset", "cifar10", "--data-dir", tmp_path / "empty",
                   "--views-dir", "none", "--output-dir", tmp_path / "run")
    assert "--data-dir" in line and "--dataset shapes needs no download" in line
    assert not (tmp_path / "run").exists()


def test_a_loss_or_network_that_is_not_finite(image_folder, tmp_path, capsys, monkeypatch):
    """Stops, says the step, keeps the last good checkpoint: that of the first epoch's 3 steps.
    A last step that ruins the weights after a finite loss does not get into a checkpoint."""
    step, calls = train_moco.train_step, []

    def broken(method, *rest):
        calls.append(1)
        readouts = step(method, *rest)
        if len(calls) == 5 and what == "loss":
            readouts["loss"] = readouts["loss"] * float("nan")
        if len(calls) == 6:
            next(method.parameters()).data.fill_(float("inf"))
        return readouts
    monkeypatch.setattr(train_moco, "train_step", broken)
    for what, number in (("loss", 5), ("network", 6)):
        calls.clear()
        last = tmp_path / what / "last.pt"
        line = refusal(capsys, run, *small(image_folder, last.parent, "--epochs", 3,
                                           "--knn-every", 9))
        assert f"{what} is not finite at step {number}" in line and str(last) in line
        assert "lower --lr or raise --temperature (learning rate" in line
        state = torch.load(last, weights_only=True)
        assert (state["epoch"], state["step"]) == (0, 3)


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    """The flags of a finished run of three epochs, and its last.pt."""
    folder = tmp_path_factory.mktemp("finished")
    flags = small(image_folder, folder, "--epochs", 3, "--knn-every", 2)
    run(*flags)
    return flags, folder / "last.pt"


def test_the_advice_for_numbers_that_are_not_finite_has_flags_of_the_method():
    """BYOL has no temperature; float16 may overflow at any rate."""
    run = types.SimpleNamespace(
        args=types.SimpleNamespace(temperature=None),
        world=types.SimpleNamespace(dtype=torch.float16),
        checkpoint=types.SimpleNamespace(path=Path("none/last.pt")),
        optimizer=types.SimpleNamespace(param_groups=[{"lr": 0.5}]))
    assert runs.Run._not_finite(run, "loss", 3) == (
        "the loss is not finite at step 3: --precision float32 or lower --lr (learning rate 0.5)")


def test_resume_of_another_run(finished, capsys):
    flags, last = finished
    before = last.read_bytes()
    assert "holds a run already" in refusal(capsys, run, *flags)
    line = refusal(capsys, run, *flags, "--arch", "resnet34", "--resume")
    assert "another run: --arch is resnet10_narrow there and resnet34 here" in line
    line = refusal(capsys, run, *flags, "--epochs", 4, "--resume")
    assert "--epochs is 3 there and 4 here" in line
    line = refusal(capsys, run, *flags, "--resume", last.with_name("backbone.pt"))
    assert f"go on with --resume {last}" in line
    assert last.read_bytes() == before


def test_knn_comes_every_so_many_epochs_and_at_the_end(finished):
    log = json_lines(finished[1].with_name("log.jsonl"))
    assert [line["epoch"] for line in log if "knn" in line] == [2, 3]


def test_a_flag_that_an_old_checkpoint_lacks_is_not_compared(finished, tmp_path, capsys):
    flags, last = finished
    state = torch.load(last, weights_only=True)
    del state["identity"]["--gamma"], state["identity"]["--weight-decay"]
    torch.save(state, tmp_path / "last.pt")
    flags = [*flags, "--output-dir", tmp_path, "--resume"]
    run(*flags)
    assert "kNN top-1" in capsys.readouterr().out


@pytest.mark.parametrize("flags, images, queue, line", [
    ("--dataset folder --data-dir x", 100_000, 9984, "--queue 9984: at most a tenth"),
    ("--dataset folder --data-dir x --queue 2560", 10_000, 2560, "*** --queue 2560 for 10000 im"),
    ("--dataset imagenet", 100_000, 65536, "*** --queue 65536 for 100000 images"),
    ("--dataset imagenet", 1_281_167, 65536, ""), ("--dataset cifar10", 10_000, 1024, ""),
    ("--dataset cifar10", 5_000, 1024, "*** --queue 1024 for 5000 images"),
    ("--dataset shapes", 4096, 2048, ""),
    ("--dataset shapes --limit 256", 256, 2048, "use --queue 128")])
def test_the_queue_holds_at_most_a_tenth_of_the_images(flags, images, queue, line, capsys):
    """In a folder ImageNet's is shortened; elsewhere, or where it is given, it is named."""
    args = parse(*flags.split(), "--views-dir", "none")
    capsys.readouterr()
    assert train_moco.limit_queue(args, images).queue == queue
    said = capsys.readouterr().out
    assert line in said and len(said.splitlines()) == bool(line)


def test_the_shortened_queue_is_that_of_the_training(image_folder, tmp_path):
    flags = small(image_folder, tmp_path / "run")
    place = flags.index("--queue")
    run(*flags[:place], *flags[place + 2:])
    state = torch.load(tmp_path / "run/last.pt")
    assert state["args"]["queue"] == 8 and len(state["model"]["queue"]) == 8    # of 24 images


@pytest.mark.parametrize("changes, line", [
    ({}, ""), (dict(warmup_epochs=5), "*** --epochs 2 ends within the warm-up"),
    (dict(freeze_epochs=2), "*** --freeze-epochs 2"), (dict(queue_after=3), "*** --queue-after 3")])
def test_schedules_longer_than_the_run_are_named(changes, line, capsys):
    train_moco.check_schedule(settings("swav", epochs=2, **changes))
    said = capsys.readouterr().out
    assert line in said and len(said.splitlines()) == bool(line)


def test_settings_are_flags_and_say_who_makes_the_views():
    """auto: this run; no attribute besides the flags."""
    flags = vars(train_moco.make_parser(METHODS, "").parse_args([])).keys() - {"print_recipe"}
    for dataset, folder in (("shapes", "auto"), ("imagenet", "none"), ("cifar10", "auto")):
        args = train_moco.parse_args(argv=["--dataset", dataset, "--data-dir", "x"])
        assert vars(args).keys() == flags and args.views_dir == folder


def test_print_recipe_needs_no_data(capsys):
    with pytest.raises(SystemExit) as stop:
        train_moco.parse_args(argv=["--dataset=folder", "--print-recipe"])
    rows = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    assert not stop.value.code
    assert rows["--lr"] == "0.03" and rows["--queue"] == "65536" and rows["--epochs"] == "200"


def test_knn_while_training_is_of_the_backbone(monkeypatch):
    seen = []
    monkeypatch.setattr(train_moco, "knn_of", lambda network, *_: seen.append(network) or 1.0)
    method = train_moco.MoCoV2(settings())
    images = Images(["a"] * 3, torch.arange(3), 3, torch.zeros(3, 1))
    args = SimpleNamespace(knn_images=None, image_size=32, workers=0)
    train_moco.evaluate_knn(images, images, SimpleNamespace(
        args=args, method=method, world=CPU, log_knn=lambda *_: None))
    assert seen == [method.query.backbone]


def test_lines_of_knn_outlive_a_resume(image_folder, tmp_path):
    flags = small(image_folder, tmp_path, "--knn-every", 1, "--save-minutes", 0, "--log-every", 1)
    with pytest.raises(UserError):
        before_call(5, fail, lambda: run(*flags), train_moco, "train_step")()
    run(*flags, "--resume")
    log = json_lines(tmp_path / "log.jsonl")
    assert [line["epoch"] for line in log if "knn" in line] == [1, 2]


def test_embeddings_are_in_single_precision():
    z = torch.randn(2, 4).bfloat16()
    assert train_moco.unit(z).dtype == torch.float32
