"""The toybox's networks, tokenizer, file formats and classifier. The files that ship are in `loratorio.toybox`."""
