"""Judges a generator: do its views keep the label and differ from each other, by noise level, and do
its foreground maps show the foreground? The paper's Fig. 3 in numbers.

    python -m studies.eval_generator --data-dir data/cifar10-jpeg      # writes runs/eval-generator

The judge is a small classifier trained on the training images; test images are judged.
Shapes: n images, D features of the judge.
"""
import sys

if not __package__:
    print("error: call it from the root: python -m studies.eval_generator", file=sys.stderr)
    sys.exit(2)


