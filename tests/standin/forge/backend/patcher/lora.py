def merge_lora_to_weight(patches, weight, key, computation_dtype=None):
    """Works in place, as the hosts' does."""
    for strength, value, _, offset, function, *_ in patches:
        function = function or (lambda change: change)
        part = weight if offset is None else weight.narrow(*offset)
        if hasattr(value, "calculate_weight"):
            value.calculate_weight(part, strength, function)
            continue
        kind, tensors = value
        if kind == "lora":
            up, down, alpha = tensors[:3]
            scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
            part += function((up.flatten(1) @ down.flatten(1)).reshape(part.shape) * scale)
        else:
            part += function(strength * tensors[0])
    return weight
