"""What a prompt may say about LoRAs: tags, roles, places and pools; the files that they name and the words that call them."""
