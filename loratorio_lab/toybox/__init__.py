"""What the toybox is made and judged with: its world as drawings, its networks, its classifier. What ships is `loratorio.toybox`."""

from __future__ import annotations

from pathlib import Path

UNREGULARISED = Path(__file__).parent / "lora_unregularised"
"""The toybox's LoRAs as trained without regularisation: each draws its element whatever the prompt says.

Those that ship learn from these.
"""
