"""Images and shares that tests of mixing draw."""

import torch
from hypothesis import strategies as st

LAMS = st.integers(0, 2**24).map(lambda k: k / 2**24)  # those that MixUp draws


def random_image(shape, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=rng).to(dtype)
    return torch.randint(0, 256, shape, generator=rng).to(dtype)
