"""The standalone host: pictures on any machine with diffusers, without a WebUI.

The way of one picture: a `request` is checked, `prompt` splits the LoRA tags off, `lora_lookup` finds their files (up to here no torch
is imported), `lora_files` reads them into adapters, `text` makes the conditioning of every mix, `schedule` walks from noise to latents
and asks the engine at each step, `generate` holds it together.
"""
