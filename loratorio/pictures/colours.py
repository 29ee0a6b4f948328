"""The colours of LoRAs, in weight maps and on the panel."""

COLOURS = (
    (230, 159, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
    (240, 228, 66),
    (150, 0, 255),
    (120, 0, 90),
    (60, 75, 0),
    (0, 0, 255),
    (255, 210, 255),
    (255, 15, 240),
    (0, 255, 210),
    (0, 210, 0),
    (75, 15, 165),
    (255, 0, 105),
    (135, 45, 0),
    (135, 120, 240),
    (180, 45, 165),
)
"""One for each composed LoRA, in order, over again after the last. The first seven are Okabe and Ito's, which colour-blind people tell
apart too; each of the others lies as far as can be from those before it (in Oklab)."""
