free = 1e12


def get_free_memory(device):
    return free
