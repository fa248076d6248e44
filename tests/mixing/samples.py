"""Images and shares that tests of mixing draw, and blends by partners and shares alone."""

import torch
from hypothesis import strategies as st

from detmix.mixing import blend as blending
from detmix.mixing.plan import Mix

LAMS = st.integers(0, 2**24).map(lambda k: k / 2**24)  # those that MixUp draws


def random_image(shape, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=rng).to(dtype)
    return torch.randint(0, 256, shape, generator=rng).to(dtype)


def plan_of(partners, lams):
    return [Mix(partner, lam) for partner, lam in zip(partners, lams, strict=False)]


def blend_batch(images, partners, lams, **options):
    return blending.blend_batch(images, plan_of(partners, lams), **options)


def blend_each(firsts, seconds, lams, **options):
    return blending.blend_pairs(firsts, seconds, plan_of(range(len(lams)), lams), **options)
