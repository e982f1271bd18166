"""recipes.py against values typed in by hand from the papers, their code and the release."""
import pytest

import genview
import recipes

# (method, architecture, epochs): peak learning rate, batch, optimiser, weight decay, warm-up,
# momentum, crop_min, default epochs. The rows of the paper's ImageNet table, and longer trainings.
TRAINING = {
    ("mocov2", None, None): (0.03, 256, "sgd", 1e-4, 0, 0.999, 0.2, 200),
    ("simsiam", None, None): (0.05, 256, "sgd", 1e-4, 0, None, 0.2, 200),
    ("byol", None, None): (4.8, 4096, "lars", 1e-6, 10, 0.99, 0.08, 200),
    ("swav", None, None): (0.6, 256, "lars", 1e-6, 0, None, 0.14, 200),
    ("mocov3", None, None): (9.6, 4096, "lars", 1e-6, 10, 0.99, 0.2, 100),
    ("mocov3", "resnet50", 100): (9.6, 4096, "lars", 1e-6, 10, 0.99, 0.2, 100),
    ("mocov3", "resnet50", 300): (4.8, 4096, "lars", 1e-6, 10, 0.99, 0.2, 100),
    ("mocov3", "resnet50", 1000): (4.8, 4096, "lars", 1.5e-6, 10, 0.996, 0.2, 100),
    ("mocov3", "vit_small", 300): (2.4e-3, 4096, "adamw", 0.1, 40, 0.99, 0.08, 300),
    ("mocov3", "vit_base", 300): (2.4e-3, 4096, "adamw", 0.1, 40, 0.99, 0.08, 300),
}
# (method, architecture): learning rate at batch, optimiser, epochs, epochs of a tenth.
PROBE = {
    ("mocov2", "resnet50"): (30, 256, "sgd", 100, [60, 80]),
    ("mocov3", "resnet50"): (0.4, 1024, "sgd", 90, []),
    ("mocov3", "vit_small"): (12, 1024, "sgd", 90, []),
    ("mocov3", "vit_base"): (12, 1024, "sgd", 90, []),
    ("simsiam", "resnet50"): (1.6, 4096, "lars", 90, []),
    ("byol", "resnet50"): (1.6, 4096, "lars", 90, []),
    ("swav", "resnet50"): (1.6, 4096, "lars", 90, []),
    (None, "resnet50"): (0.4, 1024, "sgd", 90, []),          # unknown: the architecture's, MoCo v3
    (None, "vit_base"): (12, 1024, "sgd", 90, []),
}


@pytest.mark.parametrize("key", TRAINING, ids=str)
def test_imagenet_training(key):
    recipe = recipes.training("imagenet", *key)
    lr, batch, *others = TRAINING[key]
    assert recipe["lr"] * recipe["batch_size"] / 256 == pytest.approx(lr)
    names = ("optimizer", "weight_decay", "warmup_epochs", "momentum", "crop_min", "epochs")
    assert (recipe["batch_size"], *(recipe.get(name) for name in names)) == (batch, *others)
    assert recipe["image_size"] == 224


SMALL = {"cifar10": dict(image_size=32, crop_min=0.2, blur=0.0, knn_every=10),
         "shapes": dict(image_size=32, crop_min=0.3, blur=0.0, knn_every=5)}
SGD = dict(arch="resnet18", epochs=200, batch_size=256, optimizer="sgd", weight_decay=5e-4)
ADAMW = dict(arch="resnet10_narrow", epochs=30, batch_size=128, optimizer="adamw", lr=4e-3,
             weight_decay=1e-4, warmup_epochs=1, dim=128)
# Those behind docs/RESULTS.md.
SMALL_SETS = {
    ("cifar10", "mocov2"): SGD | dict(lr=0.06, warmup_epochs=1, dim=128, queue=1024,
                                      temperature=0.15, momentum=0.99, start_batches=10),
    ("cifar10", "mocov3"): SGD | dict(lr=0.03, warmup_epochs=5, dim=256, hidden=2048,
                                      temperature=0.2, momentum=0.99),
    ("cifar10", "byol"): SGD | dict(lr=0.06, warmup_epochs=5, dim=256, hidden=1024, momentum=0.99),
    ("cifar10", "simsiam"): SGD | dict(lr=0.03, batch_size=512, warmup_epochs=0, dim=2048,
                                       hidden=512),
    ("cifar10", "swav"): SGD | dict(lr=0.06, warmup_epochs=5, dim=128, hidden=512, prototypes=128,
                                    temperature=0.1, epsilon=0.01, freeze_epochs=1, small_crops=2,
                                    small_size=16, small_min=0.08),
    ("shapes", "mocov2"): ADAMW | dict(queue=2048, temperature=0.2, momentum=0.99),
    ("shapes", "mocov3"): ADAMW | dict(hidden=512, temperature=0.2, momentum=0.99),
    ("shapes", "byol"): ADAMW | dict(hidden=512, momentum=0.98),
    ("shapes", "simsiam"): ADAMW | dict(dim=512, hidden=128),
    ("shapes", "swav"): ADAMW | dict(hidden=512, prototypes=64, temperature=0.1, epsilon=0.01,
                                     freeze_epochs=1, small_crops=2, small_size=16, small_min=0.15),
}


@pytest.mark.parametrize("key", SMALL_SETS, ids=str)
def test_training_on_small_sets(key):
    assert recipes.training(*key) == SMALL[key[0]] | SMALL_SETS[key]


def test_heads_and_losses_of_imagenet():
    wanted = {
        "mocov2": dict(dim=128, queue=65536, temperature=0.2, blur=0.5),
        "mocov3": dict(dim=256, hidden=4096, temperature=1.0, blur=0.5),
        "byol": dict(dim=256, hidden=4096),
        "simsiam": dict(dim=2048, hidden=512),
        "swav": dict(dim=128, hidden=2048, prototypes=3000, temperature=0.1, epsilon=0.05,
                     weight_decay=1e-6, crop_min=0.14, small_crops=6, small_size=96,
                     small_min=0.05, queue=3840, queue_after=15, freeze_epochs=1,
                     final_lr=0.0006)}
    for method, values in wanted.items():
        recipe = recipes.training("imagenet", method)
        assert recipe | values == recipe, method
    assert recipes.training("imagenet", "mocov3", "vit_base")["temperature"] == 0.2
    for batch, queue, lr, final_lr in ((512, 3840, 0.6, 0.0006), (1024, None, 0.3, 0),
                                       (4096, None, 0.3, 0)):        # 4.8 at 4096
        recipe = recipes.training("imagenet", "swav", None, None, batch)
        assert (recipe["queue"], recipe["lr"], recipe["final_lr"]) == (queue, lr, final_lr)
    assert not {"queue", "final_lr"} & recipes.training("cifar10", "swav").keys()


@pytest.mark.parametrize("key", PROBE, ids=str)
def test_imagenet_probe(key):
    recipe = recipes.evaluation("linear", "imagenet", 1.0, *key)
    lr, batch, optimizer, epochs, drops = PROBE[key]
    assert recipe["lr"] * batch / 256 == pytest.approx(lr)
    assert (recipe["batch_size"], recipe["optimizer"], recipe["epochs"]) == (
        batch, optimizer, epochs)
    assert [share * epochs for share in recipe["drops"]] == drops and recipe["augment"]


def test_small_data_sets_have_one_probe():
    for dataset in ("shapes", "cifar10", "cifar100", "folder"):
        recipe = recipes.evaluation("linear", dataset, 1.0, "byol", "resnet18")
        assert recipe == dict(optimizer="sgd", lr=1.0, batch_size=256, epochs=100, drops=[],
                              augment=False)


def test_fine_tuning_depends_on_the_share_of_labels():
    for labels, lr, backbone_lr in ((0.01, 5, 0.02), (0.1, 0.2, 0.01)):
        recipe = recipes.evaluation("finetune", "imagenet", labels)
        assert (recipe["lr"], recipe["backbone_lr"]) == (lr, backbone_lr)
        assert (recipe["epochs"], recipe["batch_size"]) == (20, 256)
    assert recipes.evaluation("finetune", "cifar10", 0.01) == dict(
        epochs=30, batch_size=64, lr=0.4, backbone_lr=0.04, drops=[])


def test_the_table_says_values_and_sources():
    rows = {flag: (value, source) for flag, value, source in
            recipes.table("imagenet", "mocov3", None, 1000, 2048)}
    assert rows["--epochs"] == (1000, "given") and rows["--batch-size"] == (2048, "given")
    lr, source = rows["--lr"]
    assert lr == 0.3 and "MoCo v3's code, for 300 epochs" in source
    assert source.endswith("2.4 for the batch of 2048")
    assert rows["--weight-decay"] == (1.5e-6, "MoCo v3's code, for 1000 epochs")
    assert "Chen et al. 2021" in rows["--temperature"][1]
    assert rows["--knn-every"][1] == "this project"
    for dataset in genview.DATA_DIRS:              # every value of every recipe has a row
        for method in ("mocov2", "mocov3", "byol", "simsiam", "swav"):
            table = recipes.table(dataset, method)
            values = {flag[2:].replace("-", "_"): value for flag, value, _ in table}
            assert values == recipes.training(dataset, method)
            assert values.keys() <= recipes.FLAGS.keys() and all(len(row[2]) > 5 for row in table)
