"""Operators that work element by element; with two operands, NumPy broadcasting.

Derivatives at kinks follow torch, because surrogates are trained there: 0 for Relu at 0, halves for Max of
equals, nothing through a Clip at its bound (torch's hardtanh, which ReLU6 is).
"""

from __future__ import annotations

import math

import numpy as np

from medveil.models.autodiff.emit import Value
from medveil.models.autodiff.graph import Node
from medveil.models.autodiff.rules.registry import Context, Gradients, refuse, rule

# -- one operand
# ----------------------------------------------------------------------------------------------------


@rule("Identity")
def identity(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g."""
    return [g]


@rule("Cast", "CastLike")
def cast(node: Node, ctx: Context, g: Value) -> Gradients:
    """The gradient in the input's type."""
    return [ctx.op("Cast", g, to=ctx.graph.dtypes[node.inputs[0]])]


@rule("Dropout")
def dropout(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g: in inference nothing is dropped."""
    training = ctx.constant(node, 2)
    if training is not None and bool(training):
        raise refuse(node, "it is in training mode")
    return [g]


@rule("Relu")
def relu(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g where y > 0."""
    return [ctx.gate(g, ctx.y(node), above=0.0)]


@rule("LeakyRelu")
def leaky_relu(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g where x > 0, alpha g elsewhere."""
    alpha = node.number("alpha")
    if ctx.dialect == "cpu" and 0 <= alpha <= 1:
        gate = ctx.op("HardSigmoid", ctx.x(node), alpha=3e38, beta=0.0)
        return [g * ctx.op("Clip", gate, alpha, 1.0)]
    return [ctx.op("Where", ctx.op("Greater", ctx.x(node), 0.0), g, g * alpha)]


@rule("PRelu")
def prelu(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx as LeakyRelu; d slope = g min(x, 0)."""
    x, slope = ctx.x(node), ctx.x(node, 1)
    dx = ctx.op("Where", ctx.op("Greater", x, 0.0), g, g * slope) if ctx.needs(node, 0) else None
    if not ctx.needs(node, 1):
        return [dx, None]
    d_slope = g * ctx.op("Min", x, 0.0)
    return [dx, ctx.unbroadcast(d_slope, ctx.out_shape(node), ctx.in_shape(node, 1))]


def _exponential_tail(node: Node, ctx: Context, g: Value, right: float, left: Value) -> Gradients:
    positive = ctx.op("Greater", ctx.x(node), 0.0)
    return [g * ctx.op("Where", positive, right, left)]


@rule("Elu")
def elu(node: Node, ctx: Context, g: Value) -> Gradients:
    """dy/dx is 1 where x > 0, alpha exp(x) = y + alpha elsewhere."""
    return _exponential_tail(node, ctx, g, 1.0, ctx.y(node) + node.number("alpha"))


@rule("Selu")
def selu(node: Node, ctx: Context, g: Value) -> Gradients:
    """dy/dx is gamma where x > 0, y + alpha gamma elsewhere."""
    alpha, gamma = node.number("alpha"), node.number("gamma")
    return _exponential_tail(node, ctx, g, gamma, ctx.y(node) + alpha * gamma)


@rule("Celu")
def celu(node: Node, ctx: Context, g: Value) -> Gradients:
    """dy/dx is 1 where x > 0, exp(x / alpha) = y / alpha + 1 elsewhere."""
    return _exponential_tail(node, ctx, g, 1.0, ctx.y(node) / node.number("alpha") + 1.0)


@rule("Sigmoid")
def sigmoid(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g y (1 - y)."""
    y = ctx.y(node)
    return [g * (y * (1.0 - y))]


@rule("HardSigmoid")
def hard_sigmoid(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = alpha g where 0 < y < 1."""
    return [ctx.gate(g, ctx.y(node), above=0.0, below=1.0) * node.number("alpha")]


@rule("HardSwish")
def hard_swish(node: Node, ctx: Context, g: Value) -> Gradients:
    """dy/dx is 0 up to -3, x / 3 + 1/2 up to 3, then 1."""
    x = ctx.x(node)
    inside = ctx.op("Where", ctx.op("Less", x, 3.0), x / 3.0 + 0.5, 1.0)
    return [ctx.gate(g * inside, x, above=-3.0)]


@rule("Tanh")
def tanh(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g (1 - y^2)."""
    y = ctx.y(node)
    return [g * (1.0 - y * y)]


@rule("Softplus")
def softplus(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g sigmoid(x)."""
    return [g * ctx.op("Sigmoid", ctx.x(node))]


@rule("Softsign")
def softsign(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g / (1 + |x|)^2."""
    below = ctx.op("Abs", ctx.x(node)) + 1.0
    return [g / (below * below)]


@rule("Gelu")
def gelu(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g (P(x) + x p(x)), P and p the normal distribution and its density, or their tanh approximation."""
    x = ctx.x(node)
    if node.text("approximate") == "tanh":
        # y = x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3): Hendrycks and Gimpel, arXiv 1606.08415
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        square = x * x
        t = ctx.op("Tanh", x * (square * (scale * cubic) + scale))
        slope = (1.0 - t * t) * (square * (3 * scale * cubic) + scale)
        return [g * ((t + 1.0) * 0.5 + x * slope * 0.5)]
    cdf = (ctx.op("Erf", x * math.sqrt(0.5)) + 1.0) * 0.5
    density = ctx.op("Exp", x * x * -0.5 - math.log(2 * math.pi) / 2)
    return [g * (cdf + x * density)]


@rule("Erf")
def erf(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g 2 / sqrt(pi) exp(-x^2)."""
    x = ctx.x(node)
    return [g * ctx.op("Exp", math.log(2 / math.sqrt(math.pi)) - x * x)]


@rule("Mish")
def mish(node: Node, ctx: Context, g: Value) -> Gradients:
    """Y = x t, t = tanh(softplus(x)): dx = g (t + x sigmoid(x) (1 - t^2))."""
    x = ctx.x(node)
    t = ctx.op("Tanh", ctx.op("Softplus", x))
    return [g * (t + x * ctx.op("Sigmoid", x) * (1.0 - t * t))]


@rule("Exp")
def exp(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g y."""
    return [g * ctx.y(node)]


@rule("Log")
def log(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g / x."""
    return [g / ctx.x(node)]


@rule("Sqrt")
def sqrt(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g / (2 y)."""
    return [g * 0.5 / ctx.y(node)]


@rule("Reciprocal")
def reciprocal(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = -g y^2."""
    y = ctx.y(node)
    return [-(g * (y * y))]


@rule("Abs")
def absolute(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g sign(x)."""
    return [g * ctx.op("Sign", ctx.x(node))]


@rule("Neg")
def negative(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = -g."""
    return [-g]


@rule("Sin")
def sine(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g cos(x)."""
    return [g * ctx.op("Cos", ctx.x(node))]


@rule("Cos")
def cosine(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = -g sin(x)."""
    return [-(g * ctx.op("Sin", ctx.x(node)))]


@rule("Clip")
def clip(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g strictly between the bounds."""
    low, high = ctx.constant(node, 1), ctx.constant(node, 2)
    above = float(low) if low is not None and float(low) > np.finfo(np.float32).min else None
    below = float(high) if high is not None and float(high) < np.finfo(np.float32).max else None
    return [ctx.gate(g, ctx.x(node), above=above, below=below)]


# -- two and more operands
# --------------------------------------------------------------------------------------------


def _shared(node: Node, ctx: Context, gradients: dict[int, Value]) -> Gradients:
    """Sum each operand's gradient over the axes along which that operand was broadcast."""
    y = ctx.out_shape(node)
    return [
        ctx.unbroadcast(gradients[i], y, ctx.in_shape(node, i)) if i in gradients else None
        for i in range(len(node.inputs))
    ]


def _asked(node: Node, ctx: Context) -> list[int]:
    return [i for i in range(len(node.inputs)) if ctx.needs(node, i)]


@rule("Add", "Sum")
def add(node: Node, ctx: Context, g: Value) -> Gradients:
    """Each operand gets g."""
    return _shared(node, ctx, dict.fromkeys(_asked(node, ctx), g))


@rule("Mean")
def mean(node: Node, ctx: Context, g: Value) -> Gradients:
    """Each operand gets its share of g."""
    share = g * (1 / len(node.inputs))
    return _shared(node, ctx, dict.fromkeys(_asked(node, ctx), share))


@rule("Sub")
def subtract(node: Node, ctx: Context, g: Value) -> Gradients:
    """Da = g, db = -g."""
    return _shared(node, ctx, {i: -g if i else g for i in _asked(node, ctx)})


@rule("Mul")
def multiply(node: Node, ctx: Context, g: Value) -> Gradients:
    """Da = g b, db = g a."""
    return _shared(node, ctx, {i: g * ctx.x(node, 1 - i) for i in _asked(node, ctx)})


@rule("Div")
def divide(node: Node, ctx: Context, g: Value) -> Gradients:
    """Da = g / b, db = -g y / b."""
    below = ctx.x(node, 1)
    return _shared(node, ctx, {i: -(g * ctx.y(node) / below) if i else g / below for i in _asked(node, ctx)})


@rule("Pow")
def power(node: Node, ctx: Context, g: Value) -> Gradients:
    """Dx = g p x^(p - 1), dp = g y log(x)."""
    x, exponent = ctx.x(node), ctx.x(node, 1)
    gradients: dict[int, Value] = {}
    if ctx.needs(node, 0):
        p = ctx.graph.constants.get(node.inputs[1])
        if p is not None and p.size == 1:
            power_below = float(p.reshape(-1)[0]) - 1
            gradients[0] = g * _power(ctx, x, power_below) * (power_below + 1)
        else:
            gradients[0] = g * (exponent * ctx.op("Pow", x, exponent - 1.0))
    if ctx.needs(node, 1):
        gradients[1] = g * (ctx.y(node) * ctx.op("Log", x))
    return _shared(node, ctx, gradients)


def _power(ctx: Context, x: Value, p: float) -> Value | float:
    if p in (0.0, 1.0):
        return x if p else 1.0
    return x * x if p == 2.0 else ctx.op("Pow", x, p)


@rule("Max", "Min")
def extremum(node: Node, ctx: Context, g: Value) -> Gradients:
    """G goes to the winners, in equal parts."""
    y = ctx.y(node)
    wins = [
        ctx.op("Cast", ctx.op("Equal", ctx.x(node, i), y), to=ctx.graph.dtypes[node.output])
        for i in range(len(node.inputs))
    ]
    winners = wins[0]
    for other in wins[1:]:
        winners = winners + other
    share = g / winners
    return _shared(node, ctx, {i: share * wins[i] for i in _asked(node, ctx)})


@rule("Where")
def where(node: Node, ctx: Context, g: Value) -> Gradients:
    """G goes to the side that was chosen."""
    condition = ctx.x(node)
    gradients: dict[int, Value] = {}
    if ctx.needs(node, 1):
        gradients[1] = ctx.op("Where", condition, g, 0.0)
    if ctx.needs(node, 2):
        gradients[2] = ctx.op("Where", condition, 0.0, g)
    return _shared(node, ctx, gradients)
