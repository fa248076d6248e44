"""Random chains of functions, and every entry's weight moved beside it in plain tensors.

A chain runs three times: on the weighted tensor, on the plain one, and on a plain tensor of one weight for each entry.
The last knows nothing of rows: what moves entries moves it, and what computes on them only broadcasts it.
"""

import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detmix.losses import RULES, WeightedTensor, weighted

UNARY = "neg abs square sqrt rsqrt reciprocal exp expm1 log log1p log2 atan arctan tanh sigmoid sign floor ceil round"
UNARY = [*UNARY.split(), "relu", "logsigmoid", "softplus", "nan_to_num", "clone", "contiguous", "double"]
BINARY = [
    "add",
    "sub",
    "mul",
    "div",
    "true_divide",
    "pow",
    "minimum",
    "maximum",
    "rsub",
    "remainder",
    "fmod",
    "floor_divide",
]
OPERATORS = ["__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__"]
OPERATORS += ["__pow__", "__rpow__", "__floordiv__", "__mod__"]
NAMES = {"dim": ["dim", "axis"], "keepdim": ["keepdim", "keepdims"], "input": ["input", "x", "a", "x1"]}


def make(dice, shape, integers=None):
    rng = torch.Generator().manual_seed(dice.randrange(2**31))
    if integers is not None:
        return torch.randint(0, integers, shape, generator=rng)
    return torch.rand(shape, generator=rng, dtype=torch.float64) + 0.1


def home_of(name):
    return next(home for home in (torch, F, torch.Tensor) if callable(getattr(home, name, None)))


def called(dice, name, *args, names=(), method=True):
    """A call of a function in one of its forms: as a method or not, by position or by torch's several names."""
    forms = [lambda x: getattr(home_of(name), name)(x, *args)]
    if method and hasattr(torch.Tensor, name):
        forms.append(lambda x: getattr(x, name)(*args))
    if names and len(args) == len(names):
        named = {dice.choice(NAMES.get(key, [key])): value for key, value in zip(names, args, strict=True)}
        forms.append(lambda x: getattr(home_of(name), name)(x, **named))
        if hasattr(torch, name):
            first = dice.choice(NAMES["input"][:2])
            forms.append(lambda x: getattr(torch, name)(**{first: x}, **named))
    return dice.choice(forms)


def alike(w, out):
    return w.expand(out.shape)


# Each makes (name, call, how the weights of entries follow) for a tensor; None if it is not for one of this shape.


def unary(dice, p):
    name = dice.choice(UNARY)
    return name, called(dice, name), alike


def bounded(dice, p):
    low, high = dice.choice([(0.2, 0.7), (0.3, 2.0)])
    name = dice.choice(["clamp", "clip", "clamp_min", "clamp_max"])
    if name in ("clamp", "clip"):
        return name, called(dice, name, low, high, names=("min", "max")), alike
    return name, called(dice, name, low), alike


def binary(dice, p):
    shape = [n if dice.random() < 0.7 else 1 for n in p.shape][dice.randint(0, p.ndim) :]
    if dice.random() < 0.2:
        shape = [*([2] if dice.random() < 0.5 and p.ndim < 5 else []), *p.shape]
    other = dice.choice([make(dice, shape), 0.5 + dice.random(), make(dice, shape)])
    if dice.random() < 0.4:
        name = dice.choice(OPERATORS)
        return name, lambda x: getattr(x, name)(other), alike
    name = dice.choice(BINARY)
    if name in ("minimum", "maximum") and not isinstance(other, torch.Tensor):
        name = "mul"
    if isinstance(other, torch.Tensor) and name != "rsub" and dice.random() < 0.3:  # the weighted one comes second
        return name, lambda x: getattr(torch, name)(other, x), alike
    return name, called(dice, name, other, names=() if name in ("pow", "rsub") else ("other",)), alike


def with_itself(dice, p):
    calls = [lambda x: x * x, lambda x: torch.add(x, x, alpha=2), lambda x: torch.lerp(x, x * 2, 0.3)]
    calls += [lambda x: torch.max(x, x + 1), lambda x: torch.min(x, other=x * 0.5)]
    return "with itself", dice.choice(calls), alike


def chosen(dice, p):
    mask = make(dice, p.shape) > 0.6
    calls = [lambda x: torch.where(mask, x, 0.5), lambda x: x.where(mask, 0.0), lambda x: x.masked_fill(~mask, 1.5)]
    calls += [lambda x: torch.where(condition=mask, input=x, other=x * 2), lambda x: torch.where(mask, x, p * 0)]
    return "where", dice.choice(calls), alike


def moved(dice, p):
    d, e = (dice.randrange(-p.ndim, p.ndim) for _ in range(2))
    n, order, mask = p.size(d), dice.sample(range(p.ndim), p.ndim), make(dice, p.shape) > 0.5
    key = dice.choice(["dim", "axis"])
    forms = [
        ("transpose", called(dice, "transpose", d, e, names=("dim0", "dim1"))),
        ("permute", lambda x: x.permute(order)),
        ("movedim", lambda x: torch.movedim(x, d, e)),
        ("swapaxes", lambda x: x.swapaxes(d, e)),
        ("unsqueeze", called(dice, "unsqueeze", d, names=("dim",))),
        ("squeeze", lambda x: x.unsqueeze(d).squeeze(d) if d >= 0 else x.squeeze()),
        ("flip", lambda x: x.flip(d)),
        ("roll", lambda x: x.roll(1, d)),
        ("roll all", lambda x: torch.roll(x, 2)),
        ("narrow", called(dice, "narrow", d, n // 2, n - n // 2, names=("dim", "start", "length"))),
        ("index_select", called(dice, "index_select", d, make(dice, (2,), max(n, 1)), names=("dim", "index"))),
        ("split", lambda x: torch.cat(x.split(2, dim=d)[::-1], **{key: d})),
        ("chunk", lambda x: torch.cat(torch.chunk(input=x, chunks=2, dim=d)[::-1], axis=d)),
        ("unbind", lambda x: torch.stack(x.unbind(d)[::-1], d)),
        ("stack", lambda x: torch.stack(tensors=[x, x], dim=abs(d))),
        ("cat", lambda x: torch.concat([x, x.narrow(d, 0, n // 2)], d)),
        ("repeat", lambda x: x.repeat(2, *[1] * (p.ndim - 2), 2) if p.ndim > 1 else x.repeat(3)),
        ("expand", lambda x: x[None].expand(2, *[-1] * p.ndim)),
        ("take_along_dim", called(dice, "take_along_dim", make(dice, p.shape, max(n, 1)), d, names=("indices", "dim"))),
        ("gather", called(dice, "gather", d, make(dice, p.shape, max(n, 1)), names=("dim", "index"))),
        ("flatten", called(dice, "flatten")),
        ("view", lambda x: x.reshape(-1, p.shape[-1])),
        ("ravel", lambda x: x.ravel().view(p.shape)),
        ("view_as", lambda x: x.flatten().view_as(p)),
        ("unflatten", lambda x: x.unflatten(d, (n, 1)) if n else x),
        ("masked_select", lambda x: x.masked_select(mask)),
        ("select", lambda x: torch.select(x, d, 0)),
        ("diagonal", lambda x: torch.diagonal(x, 0, d, e) if d % p.ndim != e % p.ndim else x),
    ]
    name, call = dice.choice([form for form in forms if p.numel() or form[0] not in EMPTY_HAS_NONE])
    if p.ndim > 5 or p.numel() > 300:
        return "flatten", lambda x: x.flatten()[:20], lambda w, out: w.flatten()[:20]
    return name, call, lambda w, out: call(w)


EMPTY_HAS_NONE = ("gather", "select", "index_select", "unbind", "view")


def index_for(dice, shape):
    """An index of one of all kinds, and entries of it for some of the dimensions."""
    if dice.random() < 0.15 and shape:
        mask = make(dice, shape[: dice.randint(1, len(shape))]) > 0.4
        return dice.choice([mask, mask.numpy(), (mask,), (mask, ...)])
    entries, length = [], dice.randint(1, 3)
    for n in shape[: dice.randint(1, len(shape))]:
        few = [dice.randrange(-n, n) for _ in range(length)]
        entries.append(
            dice.choice(
                [
                    *[
                        slice(None),
                        slice(0, n - 1),
                        slice(None, None, 2),
                        dice.randrange(-n, n),
                        torch.tensor(few),
                        few,
                    ],
                    *[np.array(few), tuple(few), np.int64(dice.randrange(n)), torch.tensor(few[0])],
                    *[
                        torch.tensor(few)[:, None],
                        range(min(n, length)) if min(n, length) in (1, length) else slice(None),
                    ],
                ]
            )
        )
    if dice.random() < 0.3:
        entries.insert(dice.randint(0, len(entries)), None)
    if dice.random() < 0.2:
        entries.append(...)
    bare = len(entries) == 1 and not isinstance(entries[0], tuple)  # a bare tuple indexes several dimensions
    return entries[0] if bare and dice.random() < 0.5 else tuple(entries)


def indexed(dice, p):
    if not p.ndim or 0 in p.shape:
        return None
    index = index_for(dice, p.shape)
    return f"index {index}", lambda x: x[index], lambda w, out: w[index]


def within(dice, p):
    """A number of each row, which keeps its weight."""
    name = dice.choice(
        ["sum", "mean", "nansum", "nanmean", "amax", "amin", "logsumexp", "max", "softmax", "sort", "topk"]
    )
    d, keep = dice.randrange(-p.ndim, p.ndim), dice.random() < 0.3
    if not p.size(d):
        return None
    if name in ("softmax", "sort", "topk"):
        key = dice.choice(["dim", "axis"])
        calls = {
            "softmax": lambda x: getattr(torch, dice_choice)(x, **{key: d}),
            "sort": lambda x: torch.sort(x, **{key: d}, descending=True)[0],
            "topk": lambda x: x.topk(1, **{key: d})[0],
        }
        dice_choice = dice.choice(["softmax", "log_softmax"])
        order = {
            "softmax": lambda w, out: w,
            "sort": lambda w, out: torch.take_along_dim(w, p.sort(d, descending=True)[1], d),
            "topk": lambda w, out: torch.take_along_dim(w, p.topk(1, d)[1], d),
        }
        return name, calls[name], order[name], d
    call = called(dice, name, d, keep, names=("dim", "keepdim"))
    if name == "max":
        places = p.max(d, keepdim=True)[1]
        return name, lambda x: call(x)[0], lambda w, out: torch.take_along_dim(w, places, d).reshape(out.shape)
    return f"{name} {d} {keep}", call, lambda w, out: w.narrow(d, 0, 1).reshape(out.shape), d


MAKERS = [unary, bounded, binary, binary, with_itself, chosen, moved, moved, moved, indexed, indexed, within]


# ---- ends of a chain ----

ELEMENTS = [
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.mse_loss,
    F.binary_cross_entropy_with_logits,
    F.soft_margin_loss,
]
ELEMENTS += [F.hinge_embedding_loss, F.poisson_nll_loss, F.kl_div, F.binary_cross_entropy]


CLASSES = [F.cross_entropy, F.nll_loss]


def loss_for(dice, p):
    """A loss function with some of its arguments, and the divisor of its mean."""
    loss = dice.choice([*ELEMENTS, F.gaussian_nll_loss, F.margin_ranking_loss])
    y, options, divisor = make(dice, p.shape) / 1.2, {}, p.numel()
    others = [y]
    if loss is F.gaussian_nll_loss:
        others, options = [y, dice.choice([0.7, make(dice, p.shape)])], {"full": dice.random() < 0.5}
    elif loss is F.margin_ranking_loss:
        others, options = [y, make(dice, p.shape).sub(0.6).sign()], {"margin": 0.2}
    elif loss in (F.mse_loss, F.l1_loss, F.huber_loss) and dice.random() < 0.4:
        options["weight"] = make(dice, p.shape)
        divisor = p.numel() if loss is F.huber_loss else options["weight"].sum()
    elif loss in (F.binary_cross_entropy_with_logits, F.binary_cross_entropy) and dice.random() < 0.4:
        options["weight"] = make(dice, p.shape[-1:])
    elif loss is F.smooth_l1_loss:
        options["beta"] = dice.choice([0.0, 0.5, 1.0])
    elif loss is F.kl_div:
        options["log_target"] = dice.random() < 0.5
    elif loss is F.poisson_nll_loss:
        options |= {"log_input": dice.random() < 0.7, "full": dice.random() < 0.5}
    if loss is F.binary_cross_entropy:
        return loss, lambda x, **kw: loss(x.nan_to_num().sigmoid(), *others, **options, **kw), divisor
    if "weight" not in options and len(others) == 1 and dice.random() < 0.2:  # the target has the weights
        return loss, lambda x, **kw: loss(p * 0.5, x, **options, **kw), divisor
    return loss, lambda x, **kw: loss(x, *others, **options, **kw), divisor


def end(dice, x, p, w):
    """The total of a chain, and what it is to be."""
    if p.ndim and p.size(-1) and dice.random() < 0.15 and p.ndim in (1, 2) and (w == w[..., :1]).all():
        classes, options = p.size(-1), {}
        y = make(dice, p.shape[:-1], classes)
        if dice.random() < 0.5:
            options["weight"] = make(dice, (classes,))
        loss = dice.choice(CLASSES)
        each = loss(p, y, reduction="none", **options) * w[..., 0]
        divisor = options["weight"][y].sum() if options else y.numel()
        reduction = dice.choice(["sum", "mean"])
        return (
            loss,
            lambda: loss(x, y, reduction=reduction, **options),
            each.sum() / (1 if reduction == "sum" else divisor),
        )
    if not p.ndim or dice.random() < 0.3:
        name = dice.choice(["sum", "mean"])
        return name, lambda: called(dice, name)(x), getattr((p * w), name)()
    loss, call, divisor = loss_for(dice, p)
    reduction = dice.choice(
        [{"reduction": "sum"}, {"reduction": "mean"}, {"size_average": False}, {}, {"reduce": False}]
    )
    if loss in (F.huber_loss, F.gaussian_nll_loss):
        reduction = {key: value for key, value in reduction.items() if key == "reduction"}
    each = call(p, reduction="none") * w
    if reduction == {"reduce": False}:
        return loss, lambda: call(x, **reduction).sum(), each.sum()
    return (
        loss,
        lambda: call(x, **reduction),
        each.sum() / (1 if reduction in ({"reduction": "sum"}, {"size_average": False}) else divisor),
    )


def close(got, expected, story):
    torch.testing.assert_close(
        got, expected.to(got.dtype), rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m: f"{story}: {m}"
    )


def begin(dice):
    """A weighted tensor, its entries, and the weight of each: by itself, or picked by labels that have weights."""
    shape = [dice.randint(1, 4) for _ in range(dice.randint(1, 4))]
    p, weights = make(dice, shape), make(dice, [n if dice.random() < 0.5 else 1 for n in shape])
    if dice.random() < 0.7:
        return ["weighted"], weighted(p, weights), p, weights.expand(shape)
    d, count = dice.randrange(len(shape)), dice.randint(1, 3)
    index, own = make(dice, (count,), shape[d]), make(dice, (count,))
    labels, before = weighted(index, own), [slice(None)] * d
    along = own.view([count if i == d else 1 for i in range(len(shape))])
    form = dice.choice(["index", "index_select", "pairs", "mask", "nonzero"])
    if form == "index_select":
        return [form], p.index_select(d, labels), p.index_select(d, index), along.expand(p.index_select(d, index).shape)
    if form in ("mask", "nonzero"):
        says, own = make(dice, (shape[d],), 3), make(dice, (shape[d],))
        mask = weighted(says, own) > 0
        picks = mask if form == "mask" else dice.choice([lambda: torch.where(mask)[0], lambda: mask.nonzero()[:, 0]])()
        out = p[(*before, says > 0)]
        return (
            [form],
            p[(*before, picks)],
            out,
            along.new_tensor(own[says > 0].tolist())
            .view([-1 if i == d else 1 for i in range(len(shape))])
            .expand(out.shape),
        )
    if form == "pairs" and d + 1 < len(shape):  # side by side
        other = make(dice, (count,), shape[d + 1])
        out = p[(*before, index, other)]
        return (
            [form],
            p[(*before, labels, other)],
            out,
            own.view([count if i == d else 1 for i in range(out.ndim)]).expand(out.shape),
        )
    out = p[(*before, index)]
    return ["index"], p[(*before, labels)], out, along.expand(out.shape)


def run_chain(seed):
    """Run a chain. Returns how it ended: with a number, or in a function that refuses by name."""
    dice = random.Random(seed)
    story, x, p, w = begin(dice)
    story = [f"seed {seed}", *story]
    for _ in range(dice.randint(1, 6)):
        if not p.ndim:
            break
        made = dice.choice(MAKERS)(dice, p)
        if made is None:
            continue
        name, call, follow = made[:3]
        story.append(f"{name} of {tuple(p.shape)}")
        out = call(p)
        if name.split()[0] in ("sum", "mean", "nansum", "nanmean"):
            d, keep = int(name.split()[1]), name.endswith("True")
            if x.rows.dims[d] is not None:  # entries of different weights are summed here
                got = call(x)
                assert type(got) is torch.Tensor, story
                close(got, getattr(p * w, name.split()[0])(d, keep), story)
                assert x.size(d) > 1
                return "number"
        try:
            y = call(x)
        except NotImplementedError as error:
            refused = str(error)
        else:
            refused = ""
        if refused:  # only what mixes entries of different weights, and by its name
            assert re.match(r"torch\.[\w.]*(softmax|amax|amin|logsumexp), ", refused), (story, refused)
            assert x.size(made[3]) > 1, story
            assert (w != w.narrow(made[3], 0, 1)).any() or x.rows.dims[made[3]] is not None, story
            return "refused"
        assert isinstance(y, WeightedTensor), story
        w = follow(w, out)
        close(y.as_subclass(torch.Tensor), out, story)
        close(y.weights.expand(y.shape), w, story)
        x, p = y, out
    name, total, expected = end(dice, x, p, w)
    story.append(f"{name} of {tuple(p.shape)}")
    if name in CLASSES and x.rows.dims[-1] is not None:  # classes that happen to weigh the same
        with pytest.raises(NotImplementedError, match=f"{name.__name__}.*classes of different weights"):
            total()
        return "refused"
    got = total()
    assert type(got) is torch.Tensor, story
    close(got, expected, story)
    return "number"


class Seen(dict):
    """Rules that remember the functions they were asked for."""

    def __init__(self, rules):
        super().__init__(rules)
        self.names = set()

    def get(self, function, default=None):
        self.names.add(function.__name__)
        return super().get(function, default)


pytestmark = pytest.mark.filterwarnings(
    "ignore:size_average and reduce", "ignore:reduction. 'mean' divides", "ignore:Using a "
)


@pytest.mark.parametrize(
    "seeds", [range(1000), pytest.param(range(1000, 21000), marks=pytest.mark.slow)], ids=["quick", "many"]
)
def test_chains_weigh_every_entry_by_its_own_weight(seeds):
    ends = Counter(map(run_chain, seeds))
    assert ends["number"] > 0.9 * len(seeds), ends


# What has no entries to follow, or is what tests/losses/test_latent.py and test_weighted_tensor.py are about.
NOT_IN_CHAINS = """
backward detach drop argsort argmax argmin any all one_hot interpolate grid_sample isin roi_align equal item eq ne
lt le gt ge not_equal less less_equal greater greater_equal isclose __eq__ __ne__ __lt__ __le__ __gt__ __ge__
__and__ __or__ __xor__ __rand__ __ror__ __rxor__ __invert__ bitwise_and bitwise_or bitwise_xor bitwise_not
logical_and logical_or logical_xor logical_not new_zeros new_ones new_full new_empty new_tensor isnan isinf isfinite
size dim numel __len__ is_floating_point count_nonzero bincount tolist __get__ __set__ zeros_like ones_like
full_like empty_like float half bfloat16 long int bool cpu cuda to type_as expand_as __setitem__ __deepcopy__
argwhere diag t moveaxis swapdims reshape_as concatenate __neg__ __abs__ __rfloordiv__ __rmod__ view
"""


def test_chains_have_every_function_that_has_a_rule(monkeypatch):
    monkeypatch.setattr("detmix.losses.weighted_tensor.RULES", seen := Seen(RULES))
    for seed in range(1000):
        run_chain(seed)
    names = {getattr(function, "__name__", str(function)) for function in RULES}
    names -= set(OPERATORS)  # they have other names when rules are asked for
    assert names - seen.names - set(NOT_IN_CHAINS.split()) == set()
