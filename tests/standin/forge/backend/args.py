class dynamic_args:
    nunchaku = False
    ref_latents = []
