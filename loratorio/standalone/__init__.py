"""The standalone host: pictures on any machine with diffusers, without a WebUI.

The way of one picture: `prompt` splits the LoRA tags off, `lora_files` reads the files into adapters, `text` makes the
conditioning of every mix, `sampling` walks from noise to latents and asks the engine at each step, `generate` holds it together.
"""
