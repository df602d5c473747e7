"""Fusers: `nn.Module`s that map key/value states of a sharer to those of the receiver; tensors in, tensors out."""
