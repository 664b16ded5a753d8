"""forward and dgrad: Y = X W^T and dX = dY W are one kernel.

One program owns a tile of tokens and one group of block lines: block rows in forward, block columns in dgrad. It walks
over the active blocks of a line, DEPTH values of the inner dimension at a time; blocks smaller than DEPTH are stacked,
by gathering columns of X, so that the tensor cores always get a deep tile. The weight is read where it lies, in slot
order, transposed or not: there is no copy in another order.

Shapes: T tokens, B block size, TOKENS x DEPTH a tile of X, DEPTH x B a tile of the weight, TOKENS x B a tile of Y.
"""

import triton
import triton.language as tl


# Not specialised: one machine code for all numbers of tokens and all layers of a block size.
@triton.jit(do_not_specialize=["num_tokens", "num_lines", "line_begin", "slots_begin"])
def linear_kernel(
    x_ptr, values_ptr, order_ptr, places_ptr, bias_ptr, y_ptr, gelu_ptr,
    num_tokens, num_lines, line_begin, slots_begin, x_stride, y_stride,
    B: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, LINES: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr,
    CACHE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Y[tile, line] for LINES lines; groups of lines run fastest, so that neighbours read one tile of X from L2.

    line_begin and slots_begin say where in `KernelIndex.order` the pointers and the slots of these lines begin.
    TRANSPOSED: the inner dimension is the rows of a block (dgrad). UPCAST: multiply in fp32, for the interpreter, which
    multiplies the bits of bf16.
    """
    line_ptr, slots_ptr = order_ptr + line_begin, order_ptr + slots_begin
    groups = tl.cdiv(num_lines, LINES)
    first_token = (tl.program_id(0) // groups) * TOKENS
    first_line = (tl.program_id(0) % groups) * LINES
    # A tile's own offsets fit into 32 bits; where it begins may not.
    x_ptr += first_token.to(tl.int64) * x_stride
    y_ptr += first_token.to(tl.int64) * y_stride
    gelu_ptr += first_token.to(tl.int64) * y_stride
    tokens_left = num_tokens - first_token
    if LINES == 1:
        acc = _line(x_ptr, values_ptr, line_ptr, slots_ptr, places_ptr, first_line, tokens_left, x_stride,
                    B, TOKENS, DEPTH, TRANSPOSED, CACHE, PRECISION, UPCAST)  # fmt: skip
        _store(acc, bias_ptr, y_ptr, gelu_ptr, first_line, tokens_left, y_stride, B, TOKENS, HAS_BIAS, GELU)
    else:
        for line in range(first_line, tl.minimum(first_line + LINES, num_lines)):
            acc = _line(x_ptr, values_ptr, line_ptr, slots_ptr, places_ptr, line, tokens_left, x_stride,
                        B, TOKENS, DEPTH, TRANSPOSED, CACHE, PRECISION, UPCAST)  # fmt: skip
            _store(acc, bias_ptr, y_ptr, gelu_ptr, line, tokens_left, y_stride, B, TOKENS, HAS_BIAS, GELU)


@triton.jit
def _line(
    x_ptr, values_ptr, line_ptr, slots_ptr, places_ptr, line, tokens_left, x_stride,
    B: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, TRANSPOSED: tl.constexpr,
    CACHE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The sum over the active blocks of one line, fp32 [TOKENS, B]; zeros where the line is empty."""
    begin = tl.load(line_ptr + line)
    length = tl.load(line_ptr + line + 1) - begin
    tokens = tl.arange(0, TOKENS)
    here = tokens < tokens_left
    inner = tl.arange(0, DEPTH)
    outer = tl.arange(0, B)
    acc = tl.zeros((TOKENS, B), dtype=tl.float32)
    # The index of the next step is fetched a step ahead, in registers: left in the loop's own order it would go through
    # shared memory four bytes at a time, and hold up the tiles that depend on it.
    slot, place = _slot_and_place(slots_ptr + begin, places_ptr, length, 0, B, DEPTH)
    for step in range(0, length * B, DEPTH):
        within = (step + inner) % B
        column = place * B + within
        x_mask = here[:, None]
        value_mask = outer[None, :] < B
        if B < DEPTH:
            inside = (step + inner) // B < length
            x_mask = x_mask & inside[None, :]
            value_mask = value_mask & inside[:, None]
        x = tl.load(x_ptr + tokens[:, None] * x_stride + column[None, :], mask=x_mask, other=0.0, cache_modifier=CACHE)
        if TRANSPOSED:
            value = (slot * (B * B) + within * B)[:, None] + outer[None, :]
        else:
            value = (slot * (B * B) + within)[:, None] + outer[None, :] * B
        w = tl.load(values_ptr + value, mask=value_mask, other=0.0)
        slot, place = _slot_and_place(slots_ptr + begin, places_ptr, length, step + DEPTH, B, DEPTH)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _slot_and_place(slots_ptr, places_ptr, length, step, B: tl.constexpr, DEPTH: tl.constexpr):
    """The slot and the block column of X behind each of DEPTH inner values; one of each where a block fills a tile.

    Looked up per value, by a number that is visibly the same for B values in a row: from that the compiler sees that
    gathered columns come in runs, and copies 16 bytes at a time.
    """
    if B < DEPTH:
        nth = (step + tl.arange(0, DEPTH)) // B
    else:
        nth = step // B
    slot = tl.load(slots_ptr + nth, mask=nth < length, other=0)
    return slot, tl.load(places_ptr + slot, mask=nth < length, other=0)


@triton.jit
def _store(
    acc, bias_ptr, y_ptr, gelu_ptr, line, tokens_left, y_stride,
    B: tl.constexpr, TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Add the bias, round, store; and the exact GELU of the rounded value, as if it were a step of its own."""
    outer = line * B + tl.arange(0, B)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outer).to(tl.float32)[None, :]
    tokens = tl.arange(0, TOKENS)
    here = (tokens < tokens_left)[:, None]
    where = tokens[:, None] * y_stride + outer[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + where, y, mask=here)
    if GELU:
        rounded = y.to(tl.float32)
        activated = 0.5 * rounded * (1.0 + tl.erf(rounded * 0.7071067811865476))
        tl.store(gelu_ptr + where, activated.to(y_ptr.dtype.element_ty), mask=here)
