def state_dict_prefix_replace(tensors, prefixes):
    return tensors
