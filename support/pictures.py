"""Sheets of pictures with captions: pairs.png and preview.png."""
from PIL import Image, ImageDraw


def sheet(columns, captions, frames, cell, labels):
    """One PIL image: columns of PIL images, a caption below each, a label left of each row.

    frames: {(column, row): colour}; cell: side of a picture in pixels.
    """
    gap = 6                                        # between pictures
    left = 76                                      # for the rows' labels
    foot = 34                                      # for the captions
    size = (left + len(columns) * (cell + gap), len(labels) * (cell + gap) + foot)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(labels):
        draw.text((6, row * (cell + gap) + cell // 2), label, fill="black")
    for column, (pictures, caption) in enumerate(zip(columns, captions, strict=True)):
        x = left + column * (cell + gap)
        for row, picture in enumerate(pictures):
            y = row * (cell + gap) + gap // 2
            if (column, row) in frames:
                draw.rectangle((x - 3, y - 3, x + cell + 2, y + cell + 2), frames[column, row])
            sharp = picture.width < cell               # enlarged pixels stay visible
            method = Image.Resampling.NEAREST if sharp else Image.Resampling.BICUBIC
            canvas.paste(picture.resize((cell, cell), method), (x, y))
        draw.text((x, len(labels) * (cell + gap) + 2), caption, fill="black")
    return canvas
