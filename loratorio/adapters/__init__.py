"""A LoRA as data, and the bank that gives each batch row its own. Knows no host and no file format."""
