"""The standalone host: pictures on any machine with diffusers, without a WebUI.

How a picture is made: `request` is checked, `prompt` separates the LoRA tags and `lora_lookup` finds their files. Up to here torch is
not imported. Then `lora_files` reads them into adapters, `text` makes the conditioning of every mix, and `schedule` goes from noise to
latents and calls the engine at each step. `generate` does all of this in order.
"""
