"""The tests import the scripts by file name, as the scripts do, and run offline."""
import gc
import os
import sys
from pathlib import Path

import pytest
import torch

gc.set_threshold(700, 10, 100)  # Python's collector looks at all objects rarely: it takes 0.1 s
torch.set_num_threads(1)    # for networks this small more threads only wait for each other
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """24 pictures of 32 x 32 in two classes, and as many to test on."""
    import tiny
    return tiny.save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A tiny CLIP vision model."""
    import tiny
    return tiny.save_clip(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A tiny Stable unCLIP pipeline."""
    import tiny
    return tiny.save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def views_folder(image_folder, tmp_path_factory):
    """Views of all but four of the pictures in image_folder."""
    import tiny
    return tiny.save_views(image_folder, tmp_path_factory.mktemp("views"), leave_out=4)


@pytest.fixture(scope="session")
def shapes_encoder():
    """The frozen encoder of shapes, trained briefly."""
    import shapes
    return shapes.train_encoder(steps=40, batch=64)


def pytest_addoption(parser):
    parser.addoption("--cuda", action="store_true",
                     help="use the GPU, too; without the tests that fork, which need it unused")
    parser.addoption("--instants", type=int, default=0,
                     help="test_kill.py: kill at so many random instants")


def pytest_configure(config):
    if not config.getoption("--cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish(session):
    """All is imported: Python's collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """A process that is killed loses nothing that it wrote; only a machine would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def instants(request):
    return request.config.getoption("--instants")


def pytest_terminal_summary(terminalreporter):
    """One line on what was skipped for want of a package, and how to run it."""
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    missing = [name for name in ("pycocotools", "timm") if any(name in x for x in reasons)]
    if missing:
        terminalreporter.write_line(
            f"some tests were skipped: detection needs pycocotools, foreign checkpoints need timm; "
            f"missing here: pip install {' '.join(missing)}")
