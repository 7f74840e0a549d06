"""ThunderServe (MLSys 2025): cloud against in-house, networks, losses, shifts and ablations."""
