"""Every default that is not one number for all: by data set, method, architecture and protocol.

TRAINING holds each recipe by source, {source: {flag: value}}; elsewhere a recipe is {flag: value}.
Each value is also a flag. Learning rates are for 256 images.
"""
from support.command_line import UserError, as_flag, real, whole

SOURCES = {
    "v2": "MoCo v2 (Chen et al. 2020); for CIFAR-10 the notebook of its authors",
    "v3": "MoCo v3 (Chen et al. 2021) and its code",
    "v3 long": "MoCo v3's code, for 300 epochs and more",
    "v3 longest": "MoCo v3's code, for 1000 epochs",
    "byol": "BYOL (Grill et al. 2020), the 300-epoch recipe",
    "simsiam": "SimSiam (Chen and He 2021)",
    "swav": "SwAV (Caron et al. 2020), Sec. 4 and its script for 200 epochs, batch 256",
    "swav large": "SwAV's recipe for a batch of 4096, without warm-up and with a last rate of 0",
    "release": "the code released by GenView's authors",
    "ours": "this project"}
LEAST_EPOCHS = {"v3 long": 300, "v3 longest": 1000}    # used from so many epochs on
LEAST_BATCH = {"swav large": 1024}                     # used from such a batch on

# Flags of the training recipes: (type and range, help).
FLAGS = {
    "arch": (str, "network: one of torchvision's ResNets, resnet10_narrow, vit_small, vit_base"),
    "image_size": (whole(1), "side of a view in pixels"),
    "epochs": (whole(1), "passes over the images"),
    "batch_size": (whole(1), "images in a step, of all processes together"),
    "optimizer": (str, "sgd, adamw or lars"),
    "lr": (real(0, 1e4), "learning rate for 256 images; it grows linearly with the batch"),
    "final_lr": (real(0, 1e4), "SwAV: learning rate at the end, for 256 images; else 0"),
    "weight_decay": (real(0, 1e4), "weight decay"),
    "warmup_epochs": (whole(0), "epochs in which the learning rate rises linearly"),
    "dim": (whole(1), "size of an embedding"),
    "hidden": (whole(1), "width of the hidden layers of projector and predictor; SimSiam: "
               "of the predictor alone"),
    "queue": (whole(1), "MoCo v2: past keys as negatives; SwAV: past embeddings that get codes"),
    "queue_after": (whole(0), "SwAV: epochs before the queue fills; it is used once it is full"),
    "prototypes": (whole(1), "SwAV: number of prototypes"),
    "temperature": (real(1e-4, 1e4), "temperature of the loss"),
    "epsilon": (real(1e-4, 1e4), "SwAV: smoothness of the codes; smaller is harder"),
    "freeze_epochs": (whole(0), "SwAV: epochs in which the prototypes do not learn"),
    "momentum": (real(0, 1), "momentum of the key encoder"),
    "start_batches": (whole(0), "MoCo v2: batches that set batch norm's statistics at the start"),
    "crop_min": (real(1e-3, 1), "smallest part of the image's area in a crop"),
    "small_crops": (whole(0), "SwAV: number of small crops"),
    "small_size": (whole(1), "SwAV: their side in pixels"),
    "small_min": (real(1e-3, 1), "SwAV: their smallest part of the image's area"),
    "blur": (real(0, 1), "probability of Gaussian blur (MoCo v3, BYOL: 2 and 0.2 times it)"),
    "knn_every": (whole(0), "epochs between kNN evaluations; 0: never")}

SHAPES = dict(arch="resnet10_narrow", image_size=32, epochs=30, batch_size=128, optimizer="adamw",
              lr=4e-3, weight_decay=1e-4, warmup_epochs=1, dim=128, crop_min=0.3, blur=0.0,
              knn_every=5)                         # two minutes on a laptop
CIFAR = dict(arch="resnet18", image_size=32, epochs=200, batch_size=256, optimizer="sgd",
             weight_decay=5e-4, warmup_epochs=5, crop_min=0.2, blur=0.0, knn_every=10)
VIT = dict(arch="vit_base", image_size=224, epochs=300, batch_size=4096, optimizer="adamw",
           lr=1.5e-4, weight_decay=0.1, warmup_epochs=40, dim=256, hidden=4096, temperature=0.2,
           momentum=0.99, crop_min=0.08, blur=0.5)
RESNET = dict(arch="resnet50", image_size=224, blur=0.5)

TRAINING = {
    ("imagenet", "mocov2"): {
        "v2": RESNET | dict(epochs=200, batch_size=256, optimizer="sgd", lr=0.03, weight_decay=1e-4,
                            warmup_epochs=0, dim=128, queue=65536, temperature=0.2, momentum=0.999,
                            crop_min=0.2),                                       # the release's too
        "ours": dict(start_batches=10, knn_every=20)},
    ("imagenet", "mocov3"): {
        "v3": RESNET | dict(epochs=100, batch_size=4096, optimizer="lars", lr=0.6,   # 9.6 at 4096
                            weight_decay=1e-6, warmup_epochs=10, dim=256, hidden=4096,
                            temperature=1.0, momentum=0.99, crop_min=0.2),
        "v3 long": dict(lr=0.3), "v3 longest": dict(weight_decay=1.5e-6, momentum=0.996),
        "ours": dict(knn_every=20)},
    ("imagenet", "mocov3-vit"): {"v3": VIT, "ours": dict(knn_every=20)},
    ("imagenet", "byol"): {
        "byol": RESNET | dict(batch_size=4096, optimizer="lars", lr=0.3, weight_decay=1e-6,
                              warmup_epochs=10, dim=256, hidden=4096, momentum=0.99, crop_min=0.08),
        "release": dict(epochs=200), "ours": dict(knn_every=20)},
    ("imagenet", "simsiam"): {
        "simsiam": RESNET | dict(batch_size=256, optimizer="sgd", lr=0.05, weight_decay=1e-4,
                                 warmup_epochs=0, dim=2048, hidden=512, crop_min=0.2),
        "release": dict(epochs=200), "ours": dict(knn_every=20)},
    ("imagenet", "swav"): {
        "swav": RESNET | dict(epochs=200, batch_size=256, optimizer="lars", lr=0.6, final_lr=6e-4,
                              weight_decay=1e-6, warmup_epochs=0, dim=128, hidden=2048, queue=3840,
                              queue_after=15, prototypes=3000, temperature=0.1, epsilon=0.05,
                              freeze_epochs=1, crop_min=0.14, small_crops=6, small_size=96,
                              small_min=0.05),
        # 4.8 at 4096. The paper warms up for 10 epochs and ends at 0.0048.
        "swav large": dict(lr=0.3, final_lr=0.0, warmup_epochs=0, queue=None),
        "ours": dict(knn_every=20)},
    ("cifar10", "mocov2"): {
        "v2": CIFAR | dict(dim=128, momentum=0.99),
        # The notebook's 4096, 0.03 and 0.1 give a mean cosine of negatives of 0.3: docs/RESULTS.md.
        "ours": dict(batch_size=256, warmup_epochs=1, crop_min=0.2, queue=1024, lr=0.06,
                     temperature=0.15, start_batches=10, knn_every=10)},
    ("cifar10", "mocov3"): {
        "ours": CIFAR | dict(lr=0.03, dim=256, hidden=2048, temperature=0.2, momentum=0.99)},
    ("cifar10", "mocov3-vit"): {"v3": VIT, "ours": dict(                  # patches of 4 pixels
        arch="vit_small", image_size=32, batch_size=512, lr=3e-4, hidden=1024, crop_min=0.2,
        blur=0.0, knn_every=10)},
    ("cifar10", "byol"): {"ours": CIFAR | dict(lr=0.06, dim=256, hidden=1024, momentum=0.99)},
    ("cifar10", "simsiam"): {
        "simsiam": CIFAR | dict(batch_size=512, lr=0.03, warmup_epochs=0, dim=2048, hidden=512),
        "ours": dict(epochs=200, knn_every=10)},   # 800 epochs there
    # Few images: few prototypes, no queue. At epsilon 0.05 small runs stayed at loss log P.
    ("cifar10", "swav"): {"ours": CIFAR | dict(
        lr=0.06, dim=128, hidden=512, prototypes=128, temperature=0.1, epsilon=0.01,
        freeze_epochs=1, small_crops=2, small_size=16, small_min=0.08)},
    ("shapes", "mocov2"): {"ours": SHAPES | dict(queue=2048, temperature=0.2, momentum=0.99)},
    ("shapes", "mocov3"): {"ours": SHAPES | dict(hidden=512, temperature=0.2, momentum=0.99)},
    ("shapes", "mocov3-vit"): {"ours": SHAPES | dict(
        arch="vit_narrow", lr=1e-3, hidden=512, temperature=0.2, momentum=0.99)},
    ("shapes", "byol"): {"ours": SHAPES | dict(hidden=512, momentum=0.98)},
    ("shapes", "simsiam"): {"ours": SHAPES | dict(dim=512, hidden=128)},
    ("shapes", "swav"): {
        "ours": SHAPES | dict(hidden=512, prototypes=64, temperature=0.1, epsilon=0.01,
                              freeze_epochs=1, small_crops=2, small_size=16, small_min=0.15)}}


def add_flags(parser):
    """A flag for each setting of the training recipes."""
    add = parser.add_argument_group("recipe; default: that of --dataset and --method").add_argument
    add("--print-recipe", action="store_true", help="print flags, values, sources; nothing else")
    add("--colour", type=real(0, 1), default=1.0, help="factor of strength and probability of "
        "jitter, grey, blur and solarise; 0: crops and flips alone")
    for name, (kind, text) in FLAGS.items():
        choices = ["sgd", "adamw", "lars"] if name == "optimizer" else None
        add(as_flag(name), type=kind, help=text, choices=choices)


def apply(args, recipe, owner, names=tuple(FLAGS)):
    """Fills in the recipe's values where no flag says; UserError for a flag that its owner (a
    method with a data set, or a protocol) does not have."""
    for name in names:
        if getattr(args, name) is None:
            setattr(args, name, recipe.get(name))
        elif name not in recipe:
            raise UserError(f"{as_flag(name)} is not a setting of {owner}")


def with_sources(dataset, method, arch=None, epochs=None, batch_size=None):
    """A training recipe with sources in words, {flag: (value, source)}; None: what is not given."""
    dataset = {"cifar100": "cifar10", "folder": "imagenet"}.get(dataset, dataset)
    recipe = TRAINING[dataset, method]
    if (arch or "").startswith("vit"):
        recipe = TRAINING.get((dataset, f"{method}-vit"), recipe)
    found = {}
    for source, values in recipe.items():
        long_enough = (epochs or 0) >= LEAST_EPOCHS.get(source, 0)
        large_enough = (batch_size or 0) >= LEAST_BATCH.get(source, 0)
        if long_enough and large_enough:
            found |= {flag: (value, SOURCES[source]) for flag, value in values.items()}
    return found


def training(*key):
    """A training recipe, {flag: value}. key: see with_sources."""
    return {flag: value for flag, (value, _) in with_sources(*key).items()}


def table(dataset, method, arch=None, epochs=None, batch_size=None):
    """A training recipe as rows (flag, value, source in words); None: what is not given."""
    rows = with_sources(dataset, method, arch, epochs, batch_size)
    given = {"arch": arch, "epochs": epochs, "batch_size": batch_size}
    rows |= {flag: (value, "given") for flag, value in given.items() if value is not None}
    batch = rows["batch_size"][0]
    lr, source = rows["lr"]
    rows["lr"] = lr, f"{source}; for 256 images, {lr * batch / 256:.4g} for the batch of {batch}"
    return [(as_flag(flag), *rows[flag]) for flag in FLAGS if flag in rows]


# Evaluation. lr: for 256 images, it grows linearly with the batch; drops: when it falls to a tenth,
# 0.6 of the training for example; none: a cosine to 0. augment: random crops and flips in every
# epoch; without, features are computed once and standardised, so that one lr suits all checkpoints.
PROBE = dict(optimizer="sgd", epochs=90, batch_size=1024, drops=[], augment=True)   # no decay
LINEAR = {
    "other": PROBE | dict(lr=1.0, batch_size=256, epochs=100, augment=False),            # ours
    # Of MoCo's code and the release: 30 at 256, x0.1 at epochs 60 and 80.
    "mocov2": PROBE | dict(lr=30.0, batch_size=256, epochs=100, drops=[0.6, 0.8]),
    # Of MoCo v3's code and the release: 0.4 at 1024; vision transformers 12 at 1024.
    "mocov3": PROBE | dict(lr=0.1), "mocov3-vit": PROBE | dict(lr=3.0),
    # Of SimSiam's code and, for all three, the release: 1.6 at 4096. In their papers: BYOL, SGD
    # with Nesterov, 0.2 for 256, 80 epochs; SwAV, SGD, 0.3 at 256, 100 epochs, weight decay 1e-6.
    **dict.fromkeys(("simsiam", "byol", "swav"),
                    PROBE | dict(optimizer="lars", lr=0.1, batch_size=4096))}
# lr: of the new classifier; backbone_lr: of the rest. few: less than 5% of the labels.
FINETUNE = {
    "other": dict(epochs=30, batch_size=64, lr=0.4, backbone_lr=0.04, drops=[]),  # ours: 0.1 at 64
    # SwAV's for 10% and 1% of the labels, but a cosine schedule; GenView's is not known here.
    "imagenet": dict(epochs=20, batch_size=256, lr=0.2, backbone_lr=0.01, drops=[]),
    "imagenet few": dict(epochs=20, batch_size=256, lr=5.0, backbone_lr=0.02, drops=[])}


def evaluation(protocol, dataset, labels=1.0, method=None, arch=None):
    """The recipe of an evaluation, {flag: value}. labels: the part that is labelled; method, arch:
    of the checkpoint. On ImageNet an unknown method gets its architecture's probe, MoCo v3's."""
    of_protocol = {"linear": LINEAR, "finetune": FINETUNE}.get(protocol, {"other": {}})
    if protocol == "knn" or dataset != "imagenet":
        return of_protocol["other"]
    if protocol == "finetune":
        return of_protocol["imagenet few" if labels < 0.05 else "imagenet"]
    if (arch or "").startswith("vit") and method not in ("byol", "simsiam", "swav"):
        return of_protocol["mocov3-vit"]
    return of_protocol[method if method in LINEAR else "mocov3"]


# generate_views.py, by model: ours for the miniature in weights/, the release's for Stable unCLIP.
GENERATION = {"mini": dict(steps=2, guidance=1.25), "stable": dict(steps=20, guidance=10.0)}
