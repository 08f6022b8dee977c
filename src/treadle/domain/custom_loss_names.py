"""The operations of custom losses by name: functions, methods, attributes, keywords, words and dtypes.

What is not here is refused. engine/custom_loss_ops.py has the code behind each name, and docs/custom-losses.md the same
list for people; tests compare the three. It knows no graphs.
Invariant: nothing here writes in place, reads a file, a clock, a generator or uninitialised memory, or hands out
anything but tensors and numbers.
"""

from __future__ import annotations

from collections.abc import Mapping


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations. A name stands in the group whose form clients write it in; `aliases` of older torch lead to the same ones.
FUNCTIONS_AND_METHODS = _words(
    """
    abs acos acosh add addcdiv addcmul all amax amin any argmax argmin argsort asin asinh atan atan2 atanh bitwise_and
    bitwise_not bitwise_or bitwise_xor broadcast_to ceil chunk clamp clamp_max clamp_min clip clone copysign cos cosh
    count_nonzero cummax cummin cumprod cumsum detach diagonal diff digamma div divide dot eq erf erfc erfinv exp exp2
    expm1 fix flatten flip floor floor_divide fmax fmin fmod frac gather ge greater greater_equal gt heaviside hypot
    index_select inner isfinite isinf isnan kthvalue le lerp less less_equal lgamma log log10 log1p log2 log_softmax
    logaddexp logaddexp2 logcumsumexp logical_and logical_not logical_or logical_xor logit logsumexp lt masked_fill
    masked_select matmul max maximum mean median min minimum mm moveaxis movedim mul multiply mv nan_to_num nanmean
    nansum narrow ne neg negative norm not_equal numel outer permute positive pow prod quantile reciprocal relu
    remainder repeat_interleave reshape roll round rsqrt scatter scatter_add select sgn sigmoid sign signbit sin sinc
    sinh softmax sort split sqrt square squeeze std sub subtract sum swapaxes t take tan tanh tile topk transpose tril
    triu true_divide trunc unbind unflatten unsqueeze var where xlogy
    """
)
TORCH_FUNCTIONS = _words(
    """
    arange bucketize cat concat concatenate cosine_similarity full full_like hstack linspace ones ones_like rsub
    searchsorted stack vstack zeros zeros_like
    """
)
TENSOR_METHODS = _words(
    """
    bfloat16 bool contiguous dim double expand expand_as float half int long ndimension new_full new_ones new_zeros
    repeat reshape_as size to type_as unfold view view_as
    """
)
NN_FUNCTIONS = _words(
    """
    binary_cross_entropy binary_cross_entropy_with_logits celu cosine_similarity elu gelu hardsigmoid hardswish hardtanh
    huber_loss kl_div l1_loss leaky_relu log_softmax logsigmoid margin_ranking_loss mish mse_loss normalize one_hot pad
    relu relu6 selu sigmoid silu smooth_l1_loss softmax softmin softplus softsign tanh
    """
)
SPECIAL_FUNCTIONS = _words(
    """
    digamma entr erf erfc exp2 expit expm1 gammaln log1p log_ndtr log_softmax logit logsumexp ndtr sinc softmax xlog1py
    xlogy
    """
)
MATH_FUNCTIONS = _words(
    """
    atan ceil copysign cos erf erfc exp expm1 fabs floor hypot isfinite isinf isnan lgamma log log10 log1p log2 pow sin
    sqrt tan tanh trunc
    """
)
OPERATORS = _words(
    """
    abs add and_ eq floordiv ge getitem gt inv invert le lt matmul mod mul ne neg or_ pos pow sub truediv xor
    """
)
GETATTR = "getattr"
# What `getattr` may read: of a tensor, or (the last two) of the pairs that sort, topk, max and the like return.
ATTRIBUTES = frozenset(("shape", "dtype", "ndim", "device", "T", "mT", "values", "indices"))

FUNCTIONS = frozenset(
    {
        GETATTR,
        *(f"torch.{name}" for name in FUNCTIONS_AND_METHODS | TORCH_FUNCTIONS),
        *(f"torch.nn.functional.{name}" for name in NN_FUNCTIONS),
        *(f"torch.special.{name}" for name in SPECIAL_FUNCTIONS),
        *(f"math.{name}" for name in MATH_FUNCTIONS),
        *(f"operator.{name}" for name in OPERATORS),
    }
)
METHODS = FUNCTIONS_AND_METHODS | TENSOR_METHODS
# No text of a client ever names what is written into, and no operation leaves the machine's own numbers.
assert not any(name.endswith("_") for name in METHODS | TORCH_FUNCTIONS | NN_FUNCTIONS)

# How torch.fx spells some functions that live in C, by prefix.
_ALIAS_PREFIXES = {
    "torch._C._nn.": "torch.nn.functional.",
    "torch._C._special.special_": "torch.special.",
    "torch.functional.": "torch.",
    "_operator.": "operator.",
    "builtins.": "",
}
_ALIASES = {"torch.nn.functional.log_sigmoid": "torch.nn.functional.logsigmoid"}

DTYPES = frozenset(("float16", "bfloat16", "float32", "float64", "int32", "int64", "bool"))
_DTYPE_ALIASES = {"float": "float32", "double": "float64", "half": "float16", "long": "int64", "int": "int32"}

# Keywords whose values are tensors and numbers, which torch checks itself.
FREE_KEYWORDS = _words(
    """
    alpha axis base beta boundaries chunks condition copy correction decimals delta descending diagonal dim dim0 dim1
    dims dtype end end_dim eps exponent fill_value index indices input k keepdim keepdims lambd largest log_target
    margin mask max max_val min min_val n nan neginf negative_slope num_classes offset other pos_weight posinf q
    repeats right shape shifts size sizes sorted sorted_sequence split_size split_size_or_sections src stable start
    start_dim step steps target tensor tensor1 tensor2 tensors threshold unbiased value values weight x1 x2 _stacklevel
    """
)
# Keywords with few values. Nothing is written in place, and results go nowhere but to the next node.
BOUND_KEYWORDS: Mapping[str, tuple[str | bool | None, ...]] = {
    "out": (None,),
    "inplace": (False,),
    "memory_format": (None,),
    "non_blocking": (False,),
    "size_average": (None,),
    "reduce": (None,),
    "mode": ("constant",),
    "approximate": ("none", "tanh"),
    "interpolation": ("linear", "lower", "higher", "midpoint", "nearest"),
    "reduction": ("none", "mean", "sum", "batchmean"),
    "rounding_mode": (None, "trunc", "floor"),
    "side": ("left", "right"),
}
# Positional arguments up to the first that must not be given so (in place, out=).
MAX_POSITIONAL: Mapping[str, int] = {
    **{f"torch.nn.functional.{name}": 1 for name in _words("hardsigmoid hardswish mish relu relu6 selu silu")},
    **{f"torch.nn.functional.{name}": 2 for name in _words("celu elu leaky_relu")},
    "torch.nn.functional.hardtanh": 3,
    "torch.nn.functional.normalize": 4,
    "torch.norm": 4,
}


def canonical_function(target: str) -> str:
    """The name in this table of a function as torch.fx spells it."""
    for prefix, meant in _ALIAS_PREFIXES.items():
        if target.startswith(prefix):
            target = meant + target.removeprefix(prefix)
    return _ALIASES.get(target, target)


def canonical_dtype(name: str) -> str:
    """The name in DTYPES of a dtype."""
    return _DTYPE_ALIASES.get(name, name)
