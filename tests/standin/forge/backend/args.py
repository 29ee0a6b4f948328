class dynamic_args:
    nunchaku = False
