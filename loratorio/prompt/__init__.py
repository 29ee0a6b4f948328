"""What a prompt may say of LoRAs: tags, roles, places, pools; which files they name and which words call them."""
