"""eval_linear.py: checkpoints of every format, kNN against a loop, probes with known answers."""
import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

import eval_linear as ev
import genview
import support.world
from support.augment import normalise
from support.checkpoints import load_backbone
from support.data import Images, to_tensor
from support.networks import make_backbone
from support.world import UserError, World, step_generator

ONE = World(0, 1, torch.device("cpu"), torch.float32)
DIM = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two classes and three checkpoints of one resnet18: ours, a plain state dict, the
    release's format."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.save_images(folder / "data", per_class=6, size=32)
    torch.manual_seed(0)
    state = make_backbone("resnet18", 224)[0].state_dict()
    args = {"dataset": "folder", "data_dir": str(folder / "data"), "arch": "resnet18",
            "image_size": 32}
    ours = {f"query.backbone.{k}": v for k, v in state.items()}
    ours |= {f"key.backbone.{k}": v + 1 for k, v in state.items()}
    model = ours | {"queue": torch.ones(4, 2)}
    torch.save({"model": model, "args": args, "epoch": 1}, folder / "last.pt")
    classifier = {"fc.weight": torch.ones(1000, DIM), "fc.bias": torch.ones(1000)}
    torch.save(state | classifier, folder / "plain.pt")
    release = {f"backbone.{k}": v for k, v in state.items() if "num_batches_tracked" not in k}
    release |= {"neck.fc0.weight": torch.ones(3)}
    torch.save({"meta": {}, "state_dict": release}, folder / "release.pth")
    torch.save(make_backbone("vit_narrow", 32)[0].state_dict(), folder / "vit.pt")
    return folder


@pytest.fixture(scope="module")
def images(folder):
    return genview.load_images("folder", folder / "data", "train", 32)


def settings(**values):
    usual = dict(lr=1.0, backbone_lr=0.01, epochs=20, batch_size=32, seed=0, labels=1.0,
                 labels_file=None, image_size=32, workers=0, skip_bad=False)
    return SimpleNamespace(**usual | values)


def script(*arguments):
    """Runs the script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval_linear.py", "--device", "cpu", *map(str, arguments)])
        support.world.script(ev.main)


# ------------------------------------------------------------------------------------- checkpoints

def test_all_formats_give_the_same_features(folder, images):
    features = {}
    for name in ("last.pt", "plain.pt", "release.pth"):
        backbone, dim, args = load_backbone(folder / name)
        assert dim == DIM and args.get("dataset") == ("folder" if name == "last.pt" else None)
        features[name] = ev.extract_features(backbone, images, 32, ONE, batch_size=5)
        assert features[name].shape == (12, DIM) and features[name].dtype == torch.float32
    assert torch.equal(features["last.pt"], features["plain.pt"])
    assert torch.equal(features["last.pt"], features["release.pth"])


def test_the_small_stem_is_seen_and_settings_lie_beside_a_backbone(tmp_path):
    state = make_backbone("resnet18", 32)[0].state_dict()
    torch.save(state, tmp_path / "backbone.pt")
    (tmp_path / "args.json").write_text(json.dumps({"dataset": "cifar10", "arch": "resnet18"}))
    loaded, _, args = load_backbone(tmp_path / "backbone.pt")
    assert loaded.conv1.kernel_size == (3, 3) and args["dataset"] == "cifar10"
    assert all(torch.equal(x, state[name]) for name, x in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["last.pt", "plain.pt", "release.pth"])
@pytest.mark.parametrize("arch, tensor", [("resnet50", "layer1.0.conv1.weight"),
                                          ("resnet34", "layer1.2.conv1.weight")])
def test_another_architecture_is_refused(folder, name, arch, tensor):
    with pytest.raises(UserError, match=f"another architecture.*{tensor}.*{arch}.*resnet18"):
        load_backbone(folder / name, arch)


def test_a_checkpoint_that_fits_no_architecture_is_refused(folder, tmp_path):
    state = torch.load(folder / "plain.pt")
    del state["layer2.0.bn1.running_var"]
    torch.save(state, tmp_path / "missing.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, arch, message in (("missing.pt", "resnet18", "no layer2.0.bn1.running_var"),
                                ("missing.pt", None, "--arch"), ("list.pt", "resnet18", "list.pt")):
        with pytest.raises(UserError, match=message):
            load_backbone(tmp_path / name, arch)


def test_a_vision_transformer_is_recognised(tmp_path):
    """By its tensors: architecture, patches, size. Fine-tuning changes all but positions."""
    for size in (32, 96):
        backbone, _ = make_backbone("vit_narrow", size)
        torch.save(backbone.state_dict(), tmp_path / "vit.pt")
        loaded, dim, _ = load_backbone(tmp_path / "vit.pt")
        x = torch.randn(2, 3, size, size)
        assert dim == 96 and torch.equal(loaded.eval()(x), backbone.eval()(x))
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    ev.finetune(backbone, dim, coloured(), settings(epochs=2, lr=0.01, batch_size=8, image_size=96),
                ONE)
    same = [name for name, x in backbone.state_dict().items() if torch.equal(x, before[name])]
    assert same == ["encoder.pos_embedding"]


# ---------------------------------------------------------------------------------------- features

def test_features_are_the_backbones_own(folder, images):
    backbone, _, _ = load_backbone(folder / "last.pt")
    features = ev.extract_features(backbone.train(), images, 32, ONE, batch_size=4)
    assert backbone.training                       # as it was before
    with torch.no_grad():
        again = backbone.eval()(normalise(images.pixels.float() / 255))
    torch.testing.assert_close(features, again, atol=1e-4, rtol=1e-4)
    assert ev.extract_features(backbone, images, 40, ONE).shape == (12, DIM)        # resized


def test_the_centre_of_a_file_is_cut(images):
    """28 = 32 * 224 / 256: cut, not resized."""
    on_disk = images._replace(pixels=None)
    x, = ev.pictures(on_disk, torch.arange(1), 28, ONE, 1, workers=0)
    assert images.pil(0).size == (32, 32)
    centre = to_tensor(images.pil(0).crop((2, 2, 30, 30)))
    torch.testing.assert_close(x[0], normalise(centre / 255))


def test_random_crops_are_drawn_from_seed_and_epoch(images):
    for source in (images, images._replace(pixels=None)):
        def draw(*numbers, source=source):
            return torch.cat(list(ev.pictures(source, torch.arange(12), 24, ONE, 5, workers=0,
                                              draw=numbers)))
        assert draw(0, 1).shape == (12, 3, 24, 24)
        assert torch.equal(draw(0, 1), draw(0, 1)) and not torch.equal(draw(0, 1), draw(0, 2))


def test_unreadable_files(images, tmp_path):
    bad = images._replace(pixels=None, root=tmp_path)
    with pytest.raises(UserError, match="--skip-bad"):
        list(ev.pictures(bad, torch.arange(2), 24, ONE, 2, workers=0))
    grey, = ev.pictures(bad, torch.arange(2), 24, ONE, 2, workers=0, skip_bad=True)
    torch.testing.assert_close(grey, normalise(torch.full((2, 3, 24, 24), 128 / 255)))


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
    ours = ev.knn_accuracy(train * 3, labels, test, truth, num_classes=4, k=k, temperature=t)
    if t > 0.01:                                   # exp(s / t) of the loop overflows below
        loop = knn_loop(train.tolist(), labels.tolist(), test.tolist(), truth.tolist(), 4, k, t)
        assert ours == pytest.approx(loop) and 25 < ours < 100
    else:                                          # as t falls, the nearest neighbour decides
        assert ours == ev.knn_accuracy(train, labels, test, truth, 4, k=1, temperature=1.0)


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
    listed.write_text("7.png\ntrain/a/12.png\r\n\nb/3.png\n")
    assert ev.listed_subset(names, listed).tolist() == [3, 7, 12]
    ev.finetune(Mean(), 3, coloured()._replace(names=names), settings(
        epochs=1, labels=0.01, labels_file=listed, batch_size=2, image_size=16), ONE)
    said = capsys.readouterr().out
    assert "fine-tuning on 3 labelled images" in said and "not in the data set" not in said
    assert "the list holds 5.0% of the images, but the recipe is that of --labels 0.01" in said
    with open(listed, "a") as file:
        file.write("99.png\n")
    assert ev.listed_subset(names, listed).tolist() == [3, 7, 12]
    assert "1 of its 4 names are not in the data set" in capsys.readouterr().out
    same_name = [f"{c}/7.png" for c in "abcd"]
    for others, path, message in ((["x.png"], listed, "lists 4 names, of which 0 fit 0 images"),
                                  (same_name, listed, "fit 4 images.*with their folders"),
                                  (names, tmp_path / "nothing.txt", "cannot be read as a list")):
        with pytest.raises(UserError, match=message):
            ev.listed_subset(others, path)


def test_fewer_labels_another_recipe():
    for labels, lr in ((0.01, 5.0), (0.1, 0.2)):
        given = ev.parse(["--checkpoint=x", "--dataset=imagenet", "--protocol=finetune",
                          f"--labels={labels}"])
        ev.resolve(given, {})
        assert given.lr == lr


# ------------------------------------------------------------------------------------------ probes

def test_the_linear_probe_learns_what_is_separable():
    generator = torch.Generator().manual_seed(0)
    direction, labels = torch.randn(3, 20, generator=generator), torch.arange(300) % 3
    features = direction[labels] * 2 + torch.randn(300, 20, generator=generator) * 0.3
    features[:, 3] = 7.0                           # a constant feature does no harm
    for scale in (1e-3, 1e3):                      # one learning rate for features of any size
        train, test = (scale * features).split([200, 100])
        classify = ev.linear_on_features(train, labels[:200], 3, settings(), ONE)
        assert ev.accuracy(classify(test), labels[200:]) > 98
    again = ev.linear_on_features(train, labels[:200], 3, settings(), ONE)
    assert torch.equal(classify(features), again(features))


def test_a_learning_rate_that_diverges_is_refused():
    x, labels = torch.randn(32, 8), torch.arange(32) % 2
    with pytest.raises(UserError, match="--lr"):
        ev.linear_on_features(x, labels, 2, settings(lr=float("inf")), ONE)


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


def test_linear_probe_on_augmented_pictures_trains_the_head_alone():
    backbone, images = Mean(), coloured()
    head = ev.linear_on_pictures(backbone, 3, images, settings(epochs=5, image_size=16), ONE)
    assert (backbone.factor == 1).all()
    assert ev.accuracy(head(ev.extract_features(backbone, images, 16, ONE)), images.labels) > 98


def test_finetuning_trains_the_whole_network():
    backbone, images = Mean(), coloured()
    given = settings(epochs=10, labels=0.5, batch_size=8, image_size=16)
    head = ev.finetune(backbone, 3, images, given, ONE)
    assert (backbone.factor != 1).all()
    assert ev.accuracy(head(ev.extract_features(backbone, images, 16, ONE)), images.labels) > 98


# ------------------------------------------------------------------------------------- command line

@pytest.mark.parametrize("protocol, options, last", [
    ("linear", ["--epochs", 2], "linear"),
    ("linear", ["--augment", "--epochs", 1, "--lr", 0.1], "linear"),
    ("knn", ["--k", 3], "kNN"),
    ("finetune", ["--labels", 0.5, "--epochs", 2, "--batch-size", 6], "finetune")])
def test_the_script(folder, capsys, protocol, options, last):
    script("--checkpoint", folder / "last.pt", "--protocol", protocol, *options)
    output = capsys.readouterr().out
    assert re.fullmatch(rf"{last} top-1 \d{{1,3}}\.\d%", output.splitlines()[-1])
    assert bool(re.search(r"^kNN top-1 \d", output, re.M)) == (protocol != "finetune")
    record = json.loads((folder / "eval.jsonl").read_text().splitlines()[-1])
    assert record["protocol"] == last and f"{record['top1']:.1f}%" in output.splitlines()[-1]
    assert record["settings"]["dataset"] == "folder" and record["settings"]["image_size"] == 32


@pytest.mark.parametrize("flags, message", [
    (["--checkpoint={}/last.pt", "--arch=resnet50"], "another architecture.*resnet50.*resnet18"),
    (["--checkpoint={}/none.pt"], "none.pt cannot be loaded as a checkpoint"),
    (["--checkpoint={}/plain.pt"], "does not say its data set.*--dataset"),
    (["--checkpoint={}/plain.pt", "--dataset=folder"], "needs --data-dir"),
    (["--checkpoint={}/vit.pt", "--dataset=shapes", "--image-size=64"], "leave --image-size out"),
    (["--checkpoint=x", "--labels=0"], "--labels: 0 must be from 1e-06 to 1"),
    (["--checkpoint=x", "--k=few"], "--k: invalid whole number value: 'few'"),
    ([], "required: --checkpoint")])
def test_refusals_are_one_line(folder, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        script(*(flag.format(folder) for flag in flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert re.match(f"error: .*{message}", error)


def _one_of_two(rank, store, checkpoint):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank,
                                         world_size=2)
    ev.setup = lambda device: ONE._replace(rank=rank, size=2)          # once for the three runs
    for options in (["--k", "3", "--epochs", "3", "--limit", "11"],    # 11: no multiple of two
                    ["--protocol", "finetune", "--labels", "1", "--epochs", "1"],
                    ["--augment", "--lr", "0.1", "--epochs", "1"]):
        sys.argv = ["eval_linear.py", "--checkpoint", checkpoint, *options]
        ev.main()
    torch.distributed.destroy_process_group()


def test_two_processes_evaluate_like_one(folder, tmp_path):
    shutil.copy(folder / "last.pt", tmp_path / "last.pt")
    arguments = (str(tmp_path / "store"), str(tmp_path / "last.pt"))
    torch.multiprocessing.spawn(_one_of_two, arguments, nprocs=2)
    with pytest.MonkeyPatch.context() as patch:    # float32, as the two
        patch.setattr(ev, "setup", lambda device: ONE)
        script("--checkpoint", tmp_path / "last.pt", "--k", 3, "--epochs", 3, "--limit", 11)
    records = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    top1 = [(r["protocol"], r["top1"]) for r in records]
    names = ["kNN", "linear", "finetune", "kNN", "linear", "kNN", "linear"]
    assert [name for name, _ in top1] == names
    assert top1[:2] == top1[5:]
