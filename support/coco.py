"""Annotations in COCO's format, judged when they are read.

pycocotools checks nothing. What is wrong in the file would end a training after hours, or change
the average precision without a word.
"""
import itertools
import json
import math
from pathlib import Path

from support.command_line import UserError
from support.files import refuse_placeholder

# Of the boxes with the boxes around their masks, as intersection over union, the median: COCO's has
# 1.0. With two corners in the place of left, top, width and height it is 0.6 to 0.75 even where the
# objects are large and central, with the centre in that of the corner 1/7.
LEAST_OVERLAP = 0.8


def read_annotations(path):
    """The content of a file in COCO's format: {"images", "categories", "annotations"}, lists of
    dicts with what detection needs.

    Numbers may be given as text. Annotations are numbered anew from 1: pycocotools takes the id 0
    for "no match" and keeps the last of each id. Their area is that of their masks. UserError
    names the file's first entry that is wrong.
    """
    refuse_placeholder(path)
    try:
        content = json.loads(Path(path).read_bytes())
        entries = {name: entries_of(content, name)
                   for name in ("images", "categories", "annotations")}
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, UnicodeDecodeError):  # its text holds the file's content
            reason = "it is no text"
        raise UserError(f"{path} is damaged or not in COCO's format: {reason}") from None
    images = by_id(path, "image", entries["images"], image_of)
    categories = by_id(path, "category", entries["categories"], category_of)
    annotations = []
    for place, entry in enumerate(entries["annotations"], 1):
        made = judged(path, "annotation", place, entry, annotation_of, images, categories)
        annotations.append({"id": place} | made)
    check_boxes(path, annotations)
    return {"images": list(images.values()), "categories": list(categories.values()),
            "annotations": annotations}


def entries_of(content, name):
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"it has no list of {name}")
    return entries


def by_id(path, kind, entries, read):
    """{id: entry as read makes it}; UserError where one is wrong or two have one id."""
    result = {}
    for place, entry in enumerate(entries, 1):
        made = judged(path, kind, place, entry, read)
        if made["id"] in result:
            raise UserError(f"{path}: the {kind} id {made['id']} is not unique: give each {kind} "
                            f"an id of its own, and its annotations the same")
        result[made["id"]] = made
    return result


def judged(path, kind, place, entry, read, *others):
    """read(entry, *others); its ValueError, which tells what is wrong, becomes a UserError."""
    try:
        if not isinstance(entry, dict):
            raise ValueError(f"is {shown(entry)}, not an object with fields")
        return read(entry, *others)
    except ValueError as error:
        name = f"{kind} number {place}"
        if isinstance(entry, dict) and "id" in entry:
            name = f"{kind} {shown(entry['id'])}"
        raise UserError(f"{path}: {name} {error}: correct or remove it") from None


def check_boxes(path, annotations):
    """UserError where most boxes lie beside their masks; takes "extent" out of the annotations."""
    overlaps = []
    for annotation in annotations:
        box = annotation["bbox"]
        extent = annotation.pop("extent")
        if annotation["area"] and not annotation["iscrowd"] and min(box[2:]) > 1:
            overlaps.append((overlap(box, extent), annotation["id"], box, extent))
    overlaps.sort()
    if overlaps and overlaps[len(overlaps) // 2][0] < LEAST_OVERLAP:
        _, place, box, extent = overlaps[0]
        raise UserError(f"{path}: annotation number {place} has {shown(box)} as bbox (left, top, "
                        f"width, height), but a mask in {shown([round(x, 1) for x in extent])}, "
                        f"and so have others: correct the boxes")


# ------------------------------------------------------------------------------- kinds of entries
def image_of(entry):
    return {"id": field(entry, "id", whole_number, "a whole number"),
            "file_name": field(entry, "file_name", text, "the name of a file"),
            "height": field(entry, "height", length, "a number of pixels"),
            "width": field(entry, "width", length, "a number of pixels")}


def category_of(entry):
    number = field(entry, "id", whole_number, "a whole number")
    return {"id": number, "name": str(entry.get("name", number))}


def annotation_of(entry, images, categories):
    """images, categories: {id: entry}, as read."""
    image_id = field(entry, "image_id", whole_number, "a whole number")
    if image_id not in images:
        raise ValueError(f"is of image {image_id}, which the file's images do not name")
    category_id = field(entry, "category_id", whole_number, "a whole number")
    if category_id not in categories:
        raise ValueError(f"is of category {category_id}, which the file's categories do not name")
    if not entry.get("segmentation"):
        raise ValueError("has a box but no segmentation, from which Mask R-CNN learns (the box as "
                         "a polygon would do)")
    height = images[image_id]["height"]
    width = images[image_id]["width"]
    inside = f"within {width} x {height} pixels"
    box = field(entry, "bbox", lambda values: box_of(values, height, width),
                f"left, top, width and height of a box {inside}")
    mask, area, extent = field(entry, "segmentation", lambda values: mask_of(values, height, width),
                               f"polygons of three or more points or run lengths {inside}")
    crowd = field({"iscrowd": 0} | entry, "iscrowd", flag, "0 or 1")
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "iscrowd": crowd,
            "segmentation": mask, "area": area, "extent": extent}


def field(entry, name, read, kind):
    """entry[name] as read makes it; ValueError says what is there and what it should be, kind."""
    if name not in entry:
        raise ValueError(f"has no {name}")
    try:
        return read(entry[name])
    except (ValueError, TypeError, LookupError, OverflowError):
        raise ValueError(f"has {shown(entry[name])} as {name}, not {kind}") from None


def shown(value):
    """A value of the file for a message, its beginning where it is long."""
    content = json.dumps(value)
    return content if len(content) <= 60 else content[:60] + "..."


# -------------------------------------------------------------------------------- kinds of values
def whole_number(value):
    if isinstance(value, float) and not value.is_integer():
        raise ValueError
    return int(value)


def length(value):
    number = whole_number(value)
    if number < 1:
        raise ValueError
    return number


def flag(value):
    number = whole_number(value)
    if number not in (0, 1):
        raise ValueError
    return number


def text(value):
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def numbers(values):
    if not isinstance(values, list):
        raise TypeError
    result = [float(x) for x in values]
    if not math.isfinite(sum(result)):
        raise ValueError
    return result


def box_of(values, height, width):
    """Left, top, width, height. It may leave the picture, but not lie outside."""
    left, top, w, h = box = numbers(values)
    inside = left <= width and top <= height and left + w >= 0 and top + h >= 0
    if w < 0 or h < 0 or not inside:
        raise ValueError
    return box


def mask_of(segmentation, height, width):
    """The segmentation, its area in pixels and the box around it: polygons, without parts of one or
    two points, or run lengths that fill the picture, as a list."""
    if isinstance(segmentation, dict):
        if [whole_number(x) for x in segmentation["size"]] != [height, width]:
            raise ValueError
        counts = segmentation["counts"]
        counts = run_lengths(counts) if isinstance(counts, str) else list(map(whole_number, counts))
        if min(counts) < 0 or sum(counts) != height * width:
            raise ValueError
        mask = {"size": [height, width], "counts": counts}
        return mask, sum(counts[1::2]), box_of_runs(counts, height)
    polygons = []
    for part in map(numbers, segmentation):
        if len(part) % 2 or max(map(abs, part), default=0) > 2 * max(height, width):
            raise ValueError                       # pycocotools would walk all the way to it
        if len(part) >= 6:
            polygons.append(part)
    if not polygons:
        raise ValueError
    points = sum(polygons, [])
    return polygons, sum(map(enclosed, polygons)), box_around(points[::2], points[1::2])


def box_around(x, y):
    """Left, top, width and height of a box around all points."""
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def box_of_runs(counts, height):
    """The box around a mask of run lengths, which go down column by column, zeros first."""
    ends = list(itertools.accumulate(counts))
    x = []
    y = []
    for start, end in zip(ends[::2], ends[1::2], strict=False):
        first = start // height
        last = (end - 1) // height                 # its column
        rows = [start % height, (end - 1) % height + 1] if first == last else [0, height]
        if start < end:
            x += [first, last + 1]
            y += rows
    return box_around(x or [0], y or [0])


def overlap(box, other):
    """Intersection of two boxes over their union."""
    left, top, w, h = box
    other_left, other_top, other_w, other_h = other
    across = min(left + w, other_left + other_w) - max(left, other_left)
    down = min(top + h, other_top + other_h) - max(top, other_top)
    common = max(across, 0) * max(down, 0)
    return common / (w * h + other_w * other_h - common)


def enclosed(polygon):
    """The area of a polygon x1, y1, x2, y2, ..."""
    x = polygon[::2]
    y = polygon[1::2]
    twice = sum(map(lambda x1, y1, x2, y2: x1 * y2 - x2 * y1, x, y, x[1:] + x[:1], y[1:] + y[:1]))
    return abs(twice) / 2


def run_lengths(letters):
    """The run lengths that pycocotools packs into text: five bits a letter, low bits first, and 32
    where the number goes on; the fourth and later numbers are differences to the last but one."""
    counts = []
    number = 0
    bits = 0
    for letter in letters.encode():
        value = letter - 48
        number += (value & 31) << bits
        bits += 5
        if value & 32:
            continue
        if value & 16:                             # the sign
            number -= 1 << bits
        if len(counts) > 2:
            number += counts[-2]
        counts.append(number)
        number = 0
        bits = 0
    return counts
