def get_attr(model, key):
    for name in key.split("."):
        model = getattr(model, name)
    return model
