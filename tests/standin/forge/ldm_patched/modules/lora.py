from backend.patcher.lora import merge_lora_to_weight


def calculate_weight(patches, weight, key, intermediate_dtype=None, original_weights=None):
    return merge_lora_to_weight(patches, weight, key)
