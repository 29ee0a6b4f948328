"""The colours of LoRAs, in weight maps and on the panel."""

COLOURS = (
    (230, 159, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
    (240, 228, 66),
)
"""One for each composed LoRA, in order, over again after the last: Okabe and Ito's, which colour-blind people tell apart too."""
