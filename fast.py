"""Delay and pair in one pass over memory: fused Triton kernels. Optional; hsm.py works without.

    python train.py           takes them by itself on a CUDA device, where Triton is there and all
                              HSM layers have a kernel; --no-fast forbids it, --fast insists
    fast.enable(model)        the same from Python, before torch.compile
    pytest test_fast.py       without a GPU the kernels run in Triton's interpreter, slowly

It has a file of its own because hsm.py, about 700 lines, is to stay a one-sitting read, and because
nothing here is needed to understand HSM: the reference for every kernel is the plain path there.

Why fuse? Mixing does a few operations a number and so takes as long as its data take to travel. The
least is to read x and write y; eager PyTorch also writes and reads z and other results in between.
Two kinds of pair function are elementwise, all but for linear maps before them:

    taps    y = a x + b z              a, b numbers a channel              ab, vec
    gate    y = g x + (1 - g) z        g = sigmoid(u + v), computed before gate1: u = W x
                                                                           gate2: and v = U z

The backward pass reads ahead where the forward pass reads back. With e[t] the gradient to y[t],

    dx[t] = a e[t] + b e[t + s]        da = sum of e[t] x[t]        db = sum of e[t + s] x[t]

and the same for the gate with g[t] and 1 - g[t + s]. Sums over time are added up in a fixed order
(each program its rows, then PyTorch the programs), so the same run gives the same bits.

A program works on ROWS of the B T tokens and COLS channels of one head, so its shift is one number
and all heads go in one launch. Numbers are loaded in their type, computed in float32, and stored in
the type of the result.

Tested in the interpreter, and compiled for A100 and H100: they move 16 bytes at a time, and no
register is spilled on an H100. Sizes of tiles were chosen on paper. NOT YET RUN ON A GPU: if they
fail on yours, --no-fast does without.
"""

import torch
import torch.nn as nn

from hsm import AB, BadInput, Gate1, Gate2, ShiftMixer, Vec

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise BadInput("the fast path needs Triton: pip install triton, or use --no-fast") from error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 2048  # numbers in a program's tile, 16 a thread: in the backward gate 8 such tiles are alive
TILES = 8  # tiles that a backward program adds up before it writes a sum

# ------------------------------------------------------------------------------------------------
# Kernels. x may have any strides for batch and time; all others are contiguous (B, T, C).


@triton.jit
def split(H, head_size, COLS: tl.constexpr):
    """What this program works on: a number among the row programs, a head, and its channels c.

    Returns (number, head, c, which of c are within the head).
    """
    blocks = tl.cdiv(head_size, COLS)  # of a head
    block = tl.program_id(0) % (H * blocks)
    head = block // blocks
    within = block % blocks * COLS + tl.arange(0, COLS)
    return tl.program_id(0) // (H * blocks), head, head * head_size + within, within < head_size


@triton.jit
def rows(tile, T, batch_stride, time_stride, ROWS: tl.constexpr):
    """A tile's rows among all B T, their times t, and where they lie in x."""
    row = tile * ROWS + tl.arange(0, ROWS)
    t = row % T
    at = (row // T).to(tl.int64) * batch_stride + t.to(tl.int64) * time_stride
    return row.to(tl.int64)[:, None], t[:, None], at[:, None]


@triton.jit
def taps_forward(
    x, shifts, a, b, y,
    T, n_rows, H, head_size, batch_stride, time_stride, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    tile, head, c, within = split(H, head_size, COLS)
    row, t, at = rows(tile, T, batch_stride, time_stride, ROWS)
    s = tl.load(shifts + head)
    here = (row < n_rows) & within
    x_t = tl.load(x + at + c, here, 0).to(tl.float32)
    z_t = tl.load(x + at - s * time_stride + c, here & (t >= s), 0).to(tl.float32)
    a_c, b_c = tl.load(a + c, within, 0).to(tl.float32), tl.load(b + c, within, 0).to(tl.float32)
    tl.store(y + row * H * head_size + c, a_c * x_t + b_c * z_t, mask=here)


@triton.jit
def taps_backward(
    x, shifts, a, b, e, dx, sums,
    T, n_rows, H, head_size, batch_stride, time_stride, tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    number, head, c, within = split(H, head_size, COLS)
    s, C = tl.load(shifts + head), H * head_size
    a_c, b_c = tl.load(a + c, within, 0).to(tl.float32), tl.load(b + c, within, 0).to(tl.float32)
    da, db = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    for i in range(tiles):
        row, t, at = rows(number * tiles + i, T, batch_stride, time_stride, ROWS)
        here = (row < n_rows) & within
        x_t = tl.load(x + at + c, here, 0).to(tl.float32)
        e_t = tl.load(e + row * C + c, here, 0).to(tl.float32)
        e_ahead = tl.load(e + (row + s) * C + c, here & (t + s < T), 0).to(tl.float32)
        tl.store(dx + row * C + c, a_c * e_t + b_c * e_ahead, mask=here)
        da += tl.sum(e_t * x_t, axis=0)
        db += tl.sum(e_ahead * x_t, axis=0)
    tl.store(sums + number * 2 * C + c, da, mask=within)
    tl.store(sums + (number * 2 + 1) * C + c, db, mask=within)


@triton.jit
def load_gate(u, v, at, mask):
    """sigmoid(u + v), or sigmoid(u) where there is no v."""
    logit = tl.load(u + at, mask, 0).to(tl.float32)
    if v is not None:
        logit += tl.load(v + at, mask, 0).to(tl.float32)
    return tl.sigmoid(logit)


@triton.jit
def gate_forward(
    x, shifts, u, v, y,
    T, n_rows, H, head_size, batch_stride, time_stride, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    tile, head, c, within = split(H, head_size, COLS)
    row, t, at = rows(tile, T, batch_stride, time_stride, ROWS)
    s = tl.load(shifts + head)
    here = (row < n_rows) & within
    x_t = tl.load(x + at + c, here, 0).to(tl.float32)
    z_t = tl.load(x + at - s * time_stride + c, here & (t >= s), 0).to(tl.float32)
    out = row * H * head_size + c
    g_t = load_gate(u, v, out, here)
    tl.store(y + out, g_t * x_t + (1 - g_t) * z_t, mask=here)


@triton.jit
def gate_backward(
    x, shifts, u, v, e, dx, du,
    T, n_rows, H, head_size, batch_stride, time_stride, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    tile, head, c, within = split(H, head_size, COLS)
    row, t, at = rows(tile, T, batch_stride, time_stride, ROWS)
    s, C = tl.load(shifts + head), H * head_size
    here = (row < n_rows) & within
    ahead = here & (t + s < T)
    out, later = row * C + c, (row + s) * C + c
    x_t = tl.load(x + at + c, here, 0).to(tl.float32)
    z_t = tl.load(x + at - s * time_stride + c, here & (t >= s), 0).to(tl.float32)
    e_t, g_t = tl.load(e + out, here, 0).to(tl.float32), load_gate(u, v, out, here)
    e_ahead, g_ahead = tl.load(e + later, ahead, 0).to(tl.float32), load_gate(u, v, later, ahead)
    tl.store(dx + out, g_t * e_t + (1 - g_ahead) * e_ahead, mask=here)
    tl.store(du + out, e_t * (x_t - z_t) * g_t * (1 - g_t), mask=here)


INTERPRETED = not isinstance(taps_forward, triton.JITFunction)  # TRITON_INTERPRET=1, on any device


def launch(kernel, x, shifts, *tensors, tiles=None):
    """Start programs for all rows and channels of x, each on one tile of rows or on `tiles`."""
    (B, T, C), H = x.shape, len(shifts)
    ROWS, COLS = tile_size(x, shifts)
    programs = triton.cdiv(B * T, (tiles or 1) * ROWS) * H * triton.cdiv(C // H, COLS)
    more = () if tiles is None else (tiles,)
    if programs:
        kernel[(programs,)](
            x, shifts, *tensors, T, B * T, H, C // H, x.stride(0), x.stride(1), *more,
            ROWS=ROWS, COLS=COLS,
        )  # fmt: skip


def tile_size(x, shifts):
    """Rows and columns, powers of two, of a program's tile: no wider than a head."""
    COLS = min(64, triton.next_power_of_2(x.size(2) // len(shifts)))
    return TILE // COLS, COLS


def channels_last(x):
    """x itself if its channels lie side by side, else a copy in which they do."""
    return x if x.stride(2) == 1 else x.contiguous()


# ------------------------------------------------------------------------------------------------
# Operators: what PyTorch must know of a kernel to differentiate and to compile around it.
# shifts: (H,) int64 on x's device, H a divisor of C. dtype: y's; a gradient has its input's.
# B T is below 2^31.


@torch.library.custom_op("hsm::taps", mutates_args=())
def taps(
    x: torch.Tensor, shifts: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """y[t] = a x[t] + b x[t - s].  x: (B, T, C).  a, b: (C,).  Returns (B, T, C)."""
    x = channels_last(x)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch(taps_forward, x, shifts, a.contiguous(), b.contiguous(), y)
    return y


@torch.library.custom_op("hsm::taps_gradients", mutates_args=())
def taps_gradients(
    x: torch.Tensor, shifts: torch.Tensor, a: torch.Tensor, b: torch.Tensor, e: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx (B, T, C) and, joined, da and db (2, C) of sum(e * y)."""
    x = channels_last(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n_tiles = triton.cdiv(x.size(0) * x.size(1), tile_size(x, shifts)[0])
    tiles = max(1, min(TILES, n_tiles))
    sums = torch.empty(triton.cdiv(n_tiles, tiles), 2, x.size(2), device=x.device)
    a, b, e = a.contiguous(), b.contiguous(), e.contiguous()
    launch(taps_backward, x, shifts, a, b, e, dx, sums, tiles=tiles)
    return dx, sums.sum(0)


@torch.library.custom_op("hsm::gate", mutates_args=())
def gate(
    x: torch.Tensor,
    shifts: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y[t] = g x[t] + (1 - g) x[t - s], g = sigmoid(u + v).  x, u, v, y: (B, T, C)."""
    x = channels_last(x)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch(gate_forward, x, shifts, u.contiguous(), None if v is None else v.contiguous(), y)
    return y


@torch.library.custom_op("hsm::gate_gradients", mutates_args=())
def gate_gradients(
    x: torch.Tensor,
    shifts: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor | None,
    e: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and du of sum(e * y); dv is du."""
    x = channels_last(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    u, v, e = u.contiguous(), None if v is None else v.contiguous(), e.contiguous()
    du = torch.empty_like(u)
    launch(gate_backward, x, shifts, u, v, e, dx, du)
    return dx, du


@taps.register_fake
@gate.register_fake
def _(x, shifts, u, v, dtype):
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@taps_gradients.register_fake
def _(x, shifts, a, b, e):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty(2, x.size(2), device=x.device)


@gate_gradients.register_fake
def _(x, shifts, u, v, e):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), u.new_empty(u.shape)


def remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def taps_formula(ctx, e):
    dx, (da, db) = taps_gradients(*ctx.saved_tensors, e)
    _, _, a, b = ctx.saved_tensors
    return dx, None, da.to(a.dtype), db.to(b.dtype), None


def gate_formula(ctx, e):
    dx, du = gate_gradients(*ctx.saved_tensors, e)
    return dx, None, du, None if ctx.saved_tensors[3] is None else du, None


taps.register_autograd(taps_formula, setup_context=remember)
gate.register_autograd(gate_formula, setup_context=remember)

# ------------------------------------------------------------------------------------------------
# The pair functions, and how they get into a model


def per_channel(weight, C):
    """(H,) or (C,) -> (C,): each head's number for each of its channels, in float32."""
    return weight.float().repeat_interleave(C // len(weight))


def mix_taps(pair, x, shifts, dtype):
    a, b = per_channel(pair.a, x.size(2)), per_channel(pair.b, x.size(2))
    return taps(x, shifts, a, b, dtype)


def mix_gate1(pair, x, shifts, dtype):
    return gate(x, shifts, pair.W(x), None, dtype)


def mix_gate2(pair, x, shifts, dtype):
    zero, one = x.new_zeros(x.size(2)), x.new_ones(x.size(2))
    z = taps(x, shifts, zero, one, x.dtype)  # U needs it in memory
    return gate(x, shifts, pair.W(x), pair.U(z), dtype)


MIX = {AB: mix_taps, Vec: mix_taps, Gate1: mix_gate1, Gate2: mix_gate2}


class Fused(nn.Module):
    """Delay and pair in one: forward(pair, x) is pair(x, z), in x's or in autocast's type."""

    def __init__(self, shifts):
        super().__init__()
        self.register_buffer("shifts", torch.tensor(shifts), persistent=False)

    def forward(self, pair, x):
        if x.dtype not in DTYPES:
            raise BadInput(f"the fast path knows float32, bfloat16 and float16, not {x.dtype}")
        device = x.device.type
        # As a linear map does: what follows would round y to autocast's type anyway.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return MIX[type(pair)](pair, x, self.shifts, dtype)


def enable(model):
    """Let the model's HSM layers mix in fused kernels from now on, except in streams.

    Parameters and checkpoints stay as they are. Raises BadInput, and changes nothing, where Triton
    cannot run or a pair function or type of numbers has no kernel.
    """
    mixers = [block.mixer for block in model.blocks if isinstance(block.mixer, ShiftMixer)]
    weight = model.wte.weight
    if weight.device.type != "cuda" and not INTERPRETED:
        raise BadInput(f"the fast path needs a CUDA device, not {weight.device}; use --no-fast")
    if weight.dtype not in DTYPES:
        raise BadInput(f"the fast path knows float32, bfloat16 and float16, not {weight.dtype}")
    other = sorted({type(m.pair).__name__.lower() for m in mixers if type(m.pair) not in MIX})
    if other or not mixers:
        what = ", ".join(other) or "softmax alone"
        raise BadInput(f"the fast path knows ab, vec, gate1 and gate2, not {what}; use --no-fast")
    for mixer in mixers:
        mixer.fused = Fused(mixer.shifts).to(weight.device)


def disable(model):
    """Back to the plain path."""
    for block in model.blocks:
        if isinstance(block.mixer, ShiftMixer):
            block.mixer.fused = None
