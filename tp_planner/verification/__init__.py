"""Whether a parallel model is the same function as on one device, tried on processes of this machine."""
