"""eval_linear.py: checkpoints of every format, kNN against a loop, probes with known answers."""
import inspect
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from running import CPU, call, end, json_lines, refusal, start_two
from torch import nn

import eval_linear as ev
import genview
import train_moco
from support.augment import normalise, renormalise
from support.command_line import UserError
from support.data import Images, to_tensor
from support.networks import make_backbone
from support.pictures import to_image
from support.pretrained import MEAN_STD, load_backbone
from support.processes import World, setup
from support.schedules import cosine, step_decay
from support.seeds import step_generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two classes, and checkpoints: a run's, a plain resnet18, a vision transformer."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.save_images(folder / "data", per_class=6, size=32)
    torch.manual_seed(0)
    state = make_backbone("resnet10_narrow", 32)[0].state_dict()
    args = {"dataset": "folder", "data_dir": str(folder / "data"), "arch": "resnet10_narrow",
            "image_size": 32}
    model = {f"query.backbone.{k}": v for k, v in state.items()}
    model |= {f"key.backbone.{k}": v + 1 for k, v in state.items()} | {"queue": torch.ones(4, 2)}
    torch.save({"model": model, "args": args, "epoch": 1}, folder / "last.pt")
    torch.save(make_backbone("resnet18", 224)[0].state_dict() | {
        "fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}, folder / "plain.pt")
    torch.save(make_backbone("vit_narrow", 32)[0].state_dict(), folder / "vit.pt")
    return folder


@pytest.fixture(scope="module")
def images(folder):
    return genview.load_images("folder", folder / "data", "train", 32)


def settings(**values):
    usual = dict(lr=8.0, backbone_lr=0.08, epochs=20, batch_size=32, seed=0, labels=1.0,
                 labels_file=None, image_size=32, workers=0, skip_bad=False, optimizer="sgd",
                 drops=[])                         # lr: for 256 images, 1.0 for 32
    return SimpleNamespace(**usual | values)


def script(*arguments):
    call(ev, "--device", "cpu", *arguments)


# ------------------------------------------------------------------------------------- checkpoints
def test_the_small_stem_is_seen_and_settings_lie_beside_a_backbone(tmp_path):
    state = make_backbone("resnet18", 32)[0].state_dict()
    torch.save(state, tmp_path / "backbone.pt")
    (tmp_path / "args.json").write_text(json.dumps({"dataset": "cifar10", "arch": "resnet18"}))
    loaded, _, args = load_backbone(tmp_path / "backbone.pt")
    assert loaded.conv1.kernel_size == (3, 3) and args["dataset"] == "cifar10"
    assert all(torch.equal(x, state[name]) for name, x in loaded.state_dict().items())


def test_a_vision_transformer_is_recognised(tmp_path):
    """By its tensors: architecture, patches, size. Fine-tuning changes all but positions."""
    for size in (32, 96):
        backbone, _ = make_backbone("vit_narrow", size)
        torch.save(backbone.state_dict(), tmp_path / "vit.pt")
        loaded, dim, _ = load_backbone(tmp_path / "vit.pt")
        x = torch.randn(2, 3, size, size)
        assert dim == 96 and torch.equal(loaded.eval()(x), backbone.eval()(x))
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    ev.finetune(backbone, dim, coloured(), settings(epochs=2, lr=0.3, backbone_lr=0.3, batch_size=8,
                                                     image_size=96), CPU)
    same = [name for name, x in backbone.state_dict().items() if torch.equal(x, before[name])]
    assert same == ["encoder.pos_embedding"]


def test_a_foreign_checkpoint_sees_the_pictures_it_was_trained_on(folder, monkeypatch):
    """Pictures are fed with ImageNet's mean and std; --mean-std changes that."""
    seen = []
    monkeypatch.setattr(ev, "evaluate", lambda settings, backbone, *_: seen.append(backbone.eval()))
    for more in ([], ["--mean-std", "half"]):
        script("--checkpoint", folder / "plain.pt", "--dataset", "folder", "--data-dir",
               folder / "data", "--output-dir", folder / "foreign", *more)
    x, own = torch.rand(2, 3, 32, 32), load_backbone(folder / "plain.pt")[0].eval()
    for backbone, mean_std in zip(seen, ("imagenet", "half"), strict=True):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in MEAN_STD[mean_std])
        torch.testing.assert_close(backbone(normalise(x)), own((x - mean) / std))


# ---------------------------------------------------------------------------------------- features
def test_features_are_the_backbones_own(folder, images):
    backbone, _, _ = load_backbone(folder / "last.pt")
    features = ev.extract_features(backbone.train(), images, 32, CPU, batch_size=4)
    assert backbone.training                       # as it was before
    with torch.no_grad():
        again = backbone.eval()(normalise(images.pixels.float() / 255))
    torch.testing.assert_close(features, again, atol=1e-4, rtol=1e-4)
    assert ev.extract_features(backbone, images, 40, CPU).shape == (12, 128)        # resized


def test_the_centre_of_a_file_is_cut(images):
    """28 = 32 * 224 / 256: cut, not resized."""
    on_disk = images._replace(pixels=None)
    x, = ev.pictures(on_disk, torch.arange(1), 28, CPU, 1, workers=0)
    assert images.pil(0).size == (32, 32)
    centre = to_tensor(images.pil(0).crop((2, 2, 30, 30)))
    torch.testing.assert_close(x[0], normalise(centre / 255))


@pytest.mark.parametrize("size", [(40, 80), (80, 40)])
def test_the_centre_of_an_oblong_file_is_cut(size, tmp_path):
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3, size[1], size[0]), generator=rng).to(torch.uint8)
    to_image(pixels).save(tmp_path / "0.png")
    images = Images(["0.png"], torch.zeros(1), 1, root=tmp_path)
    x, = ev.pictures(images, torch.arange(1), 35, CPU, 1, workers=0)           # 40 * 224 / 256
    left, top = ((side - 35) // 2 for side in size)
    either = [pixels[:, y:y + 35, x:x + 35] for y in (top, top + 1) for x in (left, left + 1)]
    assert any(torch.allclose(x[0], normalise(centre / 255)) for centre in either)


def test_knn_of_a_training_is_that_of_the_evaluation():
    """By 200 neighbours, for 10,000 test images."""
    for function in (ev.knn_of, ev.knn_accuracy):
        assert inspect.signature(function).parameters["k"].default == 200
    assert ev.parse_args(["--checkpoint=x"]).k == 200 and train_moco.KNN_QUERIES == 10_000


def test_random_crops_are_drawn_from_seed_and_epoch(images):
    for source in (images, images._replace(pixels=None)):
        def draw(*numbers, source=source):
            return torch.cat(list(ev.pictures(source, torch.arange(12), 24, CPU, 5, workers=0,
                                              draw=numbers)))
        assert draw(0, 1).shape == (12, 3, 24, 24)
        assert torch.equal(draw(0, 1), draw(0, 1)) and not torch.equal(draw(0, 1), draw(0, 2))


def test_unreadable_files(images, tmp_path):
    bad = images._replace(pixels=None, root=tmp_path)
    with pytest.raises(UserError, match="--skip-bad"):
        list(ev.pictures(bad, torch.arange(2), 24, CPU, 2, workers=0))


# --------------------------------------------------------------------------------------------- kNN
def knn_loop(train, labels, test, truth, num_classes, k, t):
    correct = 0
    for i, x in enumerate(test):
        sims = []
        for j, y in enumerate(train):
            dot = sum(a * b for a, b in zip(x, y, strict=True))
            length = math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
            sims.append((dot / length, labels[j]))
        votes = [0.0] * num_classes
        for s, label in sorted(sims, reverse=True)[:k]:
            votes[label] += math.exp(s / t)
        correct += votes.index(max(votes)) == truth[i]
    return 100 * correct / len(test)


@pytest.mark.parametrize("k, t", [(1, 0.1), (5, 0.1), (5, 1.0), (200, 0.1), (200, 0.001)])
def test_knn_matches_the_loop(k, t):
    generator = torch.Generator().manual_seed(0)
    labels, truth = torch.arange(40) % 4, torch.arange(23) % 4
    centres = torch.randn(4, 6, generator=generator)
    train, test = (centres[y] + 1.2 * torch.randn(len(y), 6, generator=generator)
                   for y in (labels, truth))
    chunks = zip((train * 3).split(7), labels.split(7), strict=True)
    ours = ev.knn_accuracy(chunks, test, truth, num_classes=4, k=k, temperature=t)
    if t > 0.01:                                   # exp(s / t) of the loop overflows below
        loop = knn_loop(train.tolist(), labels.tolist(), test.tolist(), truth.tolist(), 4, k, t)
        assert ours == pytest.approx(loop) and 25 < ours < 100
    else:                                          # as t falls, the nearest neighbour decides
        assert ours == ev.knn_accuracy([(train, labels)], test, truth, 4, k=1, temperature=1.0)


# ---------------------------------------------------------------------------------- labelled images
def test_balanced_subset():
    labels = torch.cat([torch.full((n,), y) for y, n in enumerate((200, 100, 10, 1))])
    labels = labels[torch.randperm(311, generator=torch.Generator().manual_seed(0))]

    def draw(fraction, seed=0):
        return ev.balanced_subset(labels, fraction, step_generator(seed))
    for fraction, counts in ((0.01, [2, 1, 1, 1]), (0.1, [20, 10, 1, 1]), (1, [200, 100, 10, 1])):
        index = draw(fraction)
        assert labels[index].bincount().tolist() == counts
        assert len(index.unique()) == len(index) and torch.equal(index, index.sort().values)
    assert torch.equal(draw(0.1), draw(0.1)) and not torch.equal(draw(0.1), draw(0.1, seed=1))


def test_finetuning_on_a_list_of_names(tmp_path, capsys):
    names = [f"train/{'ab'[i % 2]}/{i}.png" for i in range(60)]
    listed = tmp_path / "names.txt"
    listed.write_text("7.png\ntrain/a/12.png 0\r\n\nb/3.png 1\n")       # a name, or name and class
    images = coloured()._replace(names=names)
    assert ev.listed_subset(images, listed).tolist() == [3, 7, 12]
    given = settings(labels=0.01, labels_file=listed)
    chosen = ev.labelled(images, given)
    assert chosen.names == [names[i] for i in (3, 7, 12)]
    said = capsys.readouterr().out
    assert "fine-tuning on 3 labelled images" in said and "not in the data set" not in said
    assert "the list holds 5.0% of the images, but the recipe is that of --labels 0.01" in said
    with open(listed, "a") as file:
        file.write("99.png\n")
    assert ev.listed_subset(images, listed).tolist() == [3, 7, 12]
    assert "1 of its 4 names are not in the data set" in capsys.readouterr().out
    same_name = [f"{c}/7.png" for c in "abcd"]
    (wrong := tmp_path / "wrong.txt").write_text("1.png 1\n2.png 1\n")
    for others, path, message in ((["x.png"], listed, "lists 4 names, of which 0 fit 0 images"),
                                  (same_name, listed, "fit 4 images.*with their folders"),
                                  (names, wrong, "train/a/2.png is of another class there than 0"),
                                  (names, tmp_path / "nothing.txt", "cannot be read as a list")):
        with pytest.raises(UserError, match=message):
            ev.listed_subset(images._replace(names=others), path)


# ------------------------------------------------------------------------------------------ probes
def test_the_linear_probe_learns_what_is_separable():
    generator = torch.Generator().manual_seed(0)
    direction, labels = torch.randn(3, 20, generator=generator), torch.arange(300) % 3
    features = direction[labels] * 2 + torch.randn(300, 20, generator=generator) * 0.3
    features[:, 3] = 7.0                           # a constant feature does no harm
    for scale in (1e-3, 1e3):                      # one learning rate for features of any size
        train, test = (scale * features).split([200, 100])
        head = ev.linear_on_features(train, labels[:200], 3, settings())
        assert ev.top(head(test), labels[200:])["top1"] > 98
    again = ev.linear_on_features(train, labels[:200], 3, settings())
    assert torch.equal(head.weight, again.weight) and torch.equal(head.bias, again.bias)


def test_a_learning_rate_that_diverges_is_refused():
    x, labels = torch.randn(32, 8), torch.arange(32) % 2
    with pytest.raises(UserError, match="--lr"):
        ev.linear_on_features(x, labels, 2, settings(lr=float("inf")))


def test_top_1_and_top_5_by_hand():
    logits = torch.tensor([[0, 1, 2, 3, 4, 5, 6]] * 4).float()     # the first five: classes 6 to 2
    assert ev.top(logits, torch.tensor([6, 5, 2, 1])) == {"top1": 25.0, "top5": 75.0}
    assert ev.top(logits[:, :2], torch.tensor([1, 0, 0, 1])) == {"top1": 50.0, "top5": 100.0}


def test_schedules_by_hand():
    """A cosine, and MoCo v2's: a tenth from epochs 60 and 80 of 100 on."""
    assert [round(cosine(x), 4) for x in (0, 1 / 3, 0.5, 1)] == [1, 0.75, 0.5, 0]
    steps = [round(step_decay([0.6, 0.8], epoch / 100), 6) for epoch in (0, 59, 60, 79, 80, 99)]
    assert steps == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_two_steps_of_the_lars_probe_match_a_plain_loop():
    given = settings(optimizer="lars", lr=3.0, batch_size=64)              # 0.75 for 64 images
    head, optimizer = ev.probe(5, 3, given, 64, "cpu")
    w, b = head.weight.tolist(), head.bias.tolist()
    assert b == [0] * 3 and 0.005 < head.weight.std() < 0.02
    x, labels = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    ev.fit_classifier(head, optimizer, lambda epoch: [(x, labels)], 1,
                      SimpleNamespace(epochs=2, drops=[0.5]))
    mu_w, mu_b = [[0.0] * 5 for _ in range(3)], [0.0] * 3
    for lr in (0.75, 0.075):
        g_w, g_b = [[0.0] * 5 for _ in range(3)], [0.0] * 3
        for z, y in zip(x.tolist(), labels.tolist(), strict=True):
            e = [math.exp(sum(map(math.prod, zip(row, z, strict=True))) + bias)
                 for row, bias in zip(w, b, strict=True)]
            for c in range(3):                     # d loss / d logit
                d = (e[c] / sum(e) - (c == y)) / 8
                g_b[c] += d
                g_w[c] = [g + d * v for g, v in zip(g_w[c], z, strict=True)]
        trust = 0.001 * math.hypot(*sum(w, [])) / math.hypot(*sum(g_w, []))
        for c in range(3):
            mu_b[c] = 0.9 * mu_b[c] + g_b[c]
            b[c] -= lr * mu_b[c]
            mu_w[c] = [0.9 * m + trust * g for m, g in zip(mu_w[c], g_w[c], strict=True)]
            w[c] = [v - lr * m for v, m in zip(w[c], mu_w[c], strict=True)]
    torch.testing.assert_close(head.weight.data, torch.tensor(w), atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(head.bias.data, torch.tensor(b), atol=1e-6, rtol=1e-5)


class Mean(torch.nn.Module):
    """A backbone: the mean colour, times a factor to be learned."""
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x.mean((2, 3)) * self.factor


def coloured(n=60):
    """Bright and dark pictures."""
    labels = torch.arange(n) % 2
    pixels = torch.randint(0, 100, (n, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    pixels += 120 * labels.view(-1, 1, 1, 1)
    return Images([str(i) for i in range(n)], labels, 2, pixels.to(torch.uint8))


def top1(backbone, head, images):
    return ev.top(head(ev.extract_features(backbone, images, 16, CPU)), images.labels)["top1"]


def test_linear_probe_on_augmented_pictures_trains_the_head_alone():
    backbone, images = Mean(), coloured()
    validation = ev.extract_features(backbone, images, 16, CPU), images.labels
    head = ev.linear_on_pictures(backbone, 3, images, settings(epochs=5, image_size=16), CPU,
                                 validation)
    assert (backbone.factor == 1).all() and top1(backbone, head, images) > 98


def test_finetuning_trains_the_whole_network():
    backbone, images = Mean(), coloured()
    given = settings(epochs=10, lr=32.0, backbone_lr=0.32, batch_size=8, image_size=16)
    head = ev.finetune(backbone, 3, images, given, CPU)
    assert (backbone.factor != 1).all() and top1(backbone, head, images) > 98


# ------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("protocol, options, last, place, count", [
    ("linear", ["--epochs", 2, "--limit", 9], "linear", "linear", 9),
    ("linear", ["--augment", "--epochs", 1, "--lr", 0.1], "linear", "linear", 12),
    ("knn", ["--k", 3], "kNN", "knn", 12),
    ("finetune", ["--labels", 0.5, "--epochs", 2, "--batch-size", 6], "finetune", "finetune-50",
     6)])
def test_the_script(folder, capsys, protocol, options, last, place, count):
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    shutil.rmtree(folder / place, ignore_errors=True)          # another evaluation's
    script("--checkpoint", folder / "last.pt", "--protocol", protocol, *options)
    output = capsys.readouterr().out
    top5 = "" if last == "kNN" else r", top-5 100\.0%"
    line = rf"{last} top-1 \d{{1,3}}\.\d%{top5} \(fitted on {count} labelled images\)"
    assert re.fullmatch(line, output.splitlines()[-1])
    with_knn = protocol != "finetune" and "--augment" not in options
    assert bool(re.search(r"^kNN top-1 \d", output, re.M)) == with_knn
    record = json.loads((folder / place / "result.json").read_text())
    result, used = record["results"][last], record["settings"]
    assert f"top-1 {result['top1']:.1f}%" in output.splitlines()[-1]
    assert result["labelled_images"] == count and used["dataset"] == "folder"
    assert (used["image_size"], used["arch"]) == (32, "resnet10_narrow")
    files = {path.name for path in (folder / place).iterdir()} - {"result.json", "log.jsonl"}
    on_pictures = {"last.pt"} if "--augment" in options or last == "finetune" else set()
    assert files == on_pictures | ({"head.pt"} if last != "kNN" else set())
    assert before == {path: path.read_bytes() for path in folder.glob("*.*")}


def test_the_runs_own_limit_and_recipe(folder, tmp_path, capsys):
    """A run's --limit, data and method hold for its evaluation, unless flags say otherwise."""
    state = torch.load(folder / "last.pt")
    state["args"] |= {"limit": 7, "method": "byol"}
    torch.save(state, tmp_path / "last.pt")
    script("--checkpoint", tmp_path / "last.pt", "--epochs", 1)
    assert "fitted on 7 labelled images" in capsys.readouterr().out
    for flags, batch in (([], 4096), (["--batch-size=512"], 512)):
        given = ev.parse_args(["--checkpoint=last.pt", "--dataset=imagenet", *flags])
        given = ev.resolve_settings(given, state["args"] | {"mean_std": "clip"})
        assert (given.lr, given.batch_size) == (0.1, batch)
        assert "***" not in capsys.readouterr().out and given.limit is None
        assert (given.optimizer, given.epochs, given.drops) == ("lars", 90, [])
    of_others = {"arch": "resnet50", "image_size": 224, "mean_std": "imagenet"}
    ev.resolve_settings(ev.parse_args(["--checkpoint=x", "--dataset=imagenet"]), of_others)
    assert "does not say its method: MoCo v3's probe for resnet50" in capsys.readouterr().out


def test_the_network_decides_on_the_size_of_the_pictures():
    """One that was trained on large pictures does not see CIFAR's at 32 pixels."""
    args = ev.parse_args(["--checkpoint=x", "--dataset=cifar10"])
    network = {"arch": "resnet50", "mean_std": "imagenet"}
    for size in (224, 32):
        assert ev.resolve_settings(args, network | {"image_size": size}).image_size == size
    args.image_size = 64
    assert ev.resolve_settings(args, network | {"image_size": 224}).image_size == 64


class Killed(BaseException):
    pass


@pytest.mark.parametrize("flags", [["--augment", "--optimizer=lars", "--lr=10"],
                                   ["--protocol=finetune", "--labels=1", "--lr=1"]])
def test_killed_and_resumed_gives_the_same_head(folder, tmp_path, capsys, monkeypatch, flags):
    flags = [*flags, "--checkpoint", folder / "last.pt", "--epochs=3", "--batch-size=4",
             "--output-dir"]
    script(*flags, tmp_path / "whole")
    def killed_in_the_third_epoch(done):
        if done > 0.7:
            raise Killed
        return cosine(done)
    for resume in ([], ["--resume"]):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(ev, "cosine", killed_in_the_third_epoch)
            script(*flags, tmp_path / "cut", *resume)
    assert not (tmp_path / "cut/head.pt").exists()
    for other, message in (([], "holds a run already: go on with --resume"),
                           (["--resume", "--seed=1"], "seed is 0 there and 1 here")):
        assert message in refusal(capsys, script, *flags, tmp_path / "cut", *other)
    script(*flags, tmp_path / "cut", "--resume")
    a, b = (torch.load(tmp_path / name / "head.pt") for name in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert a["weight"].any()
    whole, cut = (json_lines(tmp_path / name / "log.jsonl") for name in ("whole", "cut"))
    assert whole == cut and len(whole) == 3 and ("top1" in whole[0]) == ("--augment" in flags)
    if "--augment" not in flags:                   # the fine-tuned network is a checkpoint, too
        network, _, args = load_backbone(tmp_path / "cut/last.pt")
        assert args["dataset"] == "folder" and not torch.equal(
            network[0].weight, load_backbone(folder / "last.pt")[0][0].weight)


def test_another_backbone_is_not_resumed(folder, tmp_path, capsys):
    shutil.copy(folder / "last.pt", tmp_path / "last.pt")
    flags = ["--checkpoint", tmp_path / "last.pt", "--augment", "--epochs=1", "--resume"]
    script(*flags)
    state = torch.load(tmp_path / "last.pt")
    state["model"]["query.backbone.0.weight"] += 1
    torch.save(state, tmp_path / "last.pt")
    line = refusal(capsys, script, *flags)
    assert re.search("of another run: backbone is .* there", line)


@pytest.mark.parametrize("flags, message", [
    (["--checkpoint={}/last.pt", "--arch=resnet50"], "another architecture.*resnet50.*resnet10"),
    (["--checkpoint={}/none.pt"], "none.pt cannot be loaded as a checkpoint"),
    (["--checkpoint={}/plain.pt"], "does not say its data set.*--dataset"),
    (["--checkpoint={}/plain.pt", "--dataset=folder"], "needs --data-dir"),
    (["--checkpoint={}/vit.pt", "--dataset=shapes", "--image-size=64"], "leave --image-size out"),
    (["--checkpoint={}/last.pt", "--output-dir={}"], "holds a run already.*another --output-dir"),
    (["--checkpoint={}/last.pt", "--output-dir={}/vit.pt/x"], "cannot be written.*--output-dir"),
    (["--checkpoint={}/last.pt", "--protocol=finetune", "--augment"],
     "--augment is not a setting of --protocol finetune"),
    (["--checkpoint=x", "--labels=0"], "--labels: 0 must be from 1e-06 to 1"),
    (["--checkpoint=x", "--k=few"], "--k: invalid whole number value: 'few'"),
    ([], "required: --checkpoint")])
def test_refusals_are_one_line(folder, capsys, flags, message):
    line = refusal(capsys, script, *(flag.format(folder) for flag in flags))
    assert re.search(message, line)


def test_two_processes_evaluate_like_one(folder, tmp_path, monkeypatch):
    shutil.copy(folder / "last.pt", tmp_path / "last.pt")
    knn = ["--k", 3, "--epochs", 3, "--limit", 11]           # 11: no multiple of two

    def evaluate(*flags):
        script("--checkpoint", tmp_path / "last.pt", *flags)

    def work():
        world = setup("cpu")._replace(dtype=torch.float32)   # once for the three runs
        monkeypatch.setattr(ev, "setup", lambda device, **_: world)
        evaluate(*knn)
        evaluate("--protocol", "finetune", "--labels", 1, "--epochs", 1)
        evaluate("--augment", "--lr", 0.1, "--epochs", 1, "--output-dir", tmp_path / "store-2")
        evaluate("--protocol=knn", "--k=3", "--limit=11")
    assert end(*start_two([work] * 2, tmp_path)) == [0, 0]
    monkeypatch.setattr(ev, "setup", lambda device, **_: CPU)
    evaluate(*knn, "--output-dir", tmp_path / "one")
    two, tuned, pictures, streamed, one = (
        json.loads((tmp_path / name / "result.json").read_text())["results"]
        for name in ("linear", "finetune-100", "store-2", "knn", "one"))
    assert two == one and tuned["finetune"]["labelled_images"] == 12
    assert list(pictures) == ["linear"] and streamed == {"kNN": one["kNN"]}


def test_statistics_of_fine_tuning_are_those_of_the_first_process(monkeypatch):
    class Two(World):
        def distributed(self, network, **_):
            return network
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, source: sent.append(source))
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten())
    ev.finetune(network, 4, coloured(), settings(epochs=1, image_size=16),
                Two(0, 2, torch.device("cpu"), torch.float32))
    assert sent == [0] * 3


def test_processes_draw_crops_and_flips_of_their_own():
    one, two = (torch.cat(list(ev.pictures(coloured(), torch.arange(12), 12, CPU._replace(
        rank=rank, size=2), 4, draw=(0, 1)))) for rank in (0, 1))
    assert (one - two).abs().mean() > 0.01


def test_pictures_in_memory_are_resized_without_aliasing():
    stripes = (torch.arange(64) % 2 * 255).byte().expand(1, 3, 64, 64).contiguous()
    x, = ev.pictures(Images(["a"], torch.zeros(1), 1, stripes), torch.arange(1), 32, CPU, 1)
    assert (renormalise(x) - 0.5).abs().max() < 0.2


def test_knn_of_more_than_512_queries():
    truth = torch.arange(1200) % 2
    queries = torch.eye(2)[truth]
    assert ev.knn_accuracy([(torch.eye(2), torch.arange(2))], queries, truth, 2, k=1) == 100
