"""How the toybox is made and judged: its world as drawings, its networks, its classifier. The files that ship are in `loratorio.toybox`."""

from __future__ import annotations

from pathlib import Path

UNREGULARISED = Path(__file__).parent / "lora_unregularised"
"""The toybox's LoRAs as trained without regularisation: each draws its element whatever the prompt says.

Those that ship learn from these.
"""
