"""wgrad: dW = dY^T X at the active blocks, and nowhere else.

One program owns one block row, up to WIDTH / B of its blocks, and a range of tokens. It computes the transpose,
X_gathered^T dY: the gathered columns of X stand on the long side of the tensor cores' tile, which is so filled even at
B = 16. Where that gives too few programs, tokens are split into ranges, each range writes fp32 parts of its own, and
`sum_parts_kernel` adds them in a fixed order: no atomics, the same bits every time.

Shapes: T tokens, K active blocks, B block size, R block rows, WIDTH gathered columns of X, DEPTH tokens in a tile.
"""

import triton
import triton.language as tl


# Not specialised: one machine code for all numbers of tokens and most layers of a block size.
@triton.jit(do_not_specialize=["num_tokens", "tokens_per_part", "num_chunks", "num_rows", "num_active"])
def wgrad_kernel(
    dy_ptr, x_ptr, order_ptr, cols_ptr, out_ptr,
    num_tokens, tokens_per_part, num_chunks, num_rows, num_active, dy_stride, x_stride,
    B: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    CACHE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Part `program // num_chunks` of chunk `program % num_chunks`, into out [parts, K, B, B].

    The grid cannot know how many chunks the rows come to, only that they are at most num_chunks: the programs beyond
    leave at once. ROWS is R rounded up to a power of two. UPCAST: see linear_kernel.
    """
    PER_CHUNK: tl.constexpr = WIDTH // B
    row_ptr, slots_ptr = order_ptr, order_ptr + num_rows + 1  # as KernelIndex.order has them
    chunk = tl.program_id(0) % num_chunks
    part = tl.program_id(0) // num_chunks
    row, begin, length = _find_chunk(row_ptr, num_rows, chunk, PER_CHUNK, ROWS)
    if row < num_rows:
        gathered = tl.arange(0, WIDTH)
        outer = tl.arange(0, B)
        inside = gathered // B < length
        slot = tl.load(slots_ptr + begin + gathered // B, mask=inside, other=0)
        col = tl.load(cols_ptr + slot, mask=inside, other=0)
        column = col * B + gathered % B
        first_token = part * tokens_per_part
        stop = tl.minimum(first_token + tokens_per_part, num_tokens)
        tokens = tl.arange(0, DEPTH)
        # A tile's own offsets fit into 32 bits; where it begins may not.
        x_ptr += first_token.to(tl.int64) * x_stride
        dy_ptr += first_token.to(tl.int64) * dy_stride + row * B
        x_tile = column[:, None] + tokens[None, :] * x_stride
        dy_tile = tokens[:, None] * dy_stride + outer[None, :]
        acc = tl.zeros((WIDTH, B), dtype=tl.float32)
        for token in range(first_token, stop, DEPTH):
            here = token + tokens < stop
            x = tl.load(x_ptr + x_tile, mask=inside[:, None] & here[None, :], other=0.0, cache_modifier=CACHE)
            dy = tl.load(dy_ptr + dy_tile, mask=here[:, None], other=0.0)
            if UPCAST:
                x, dy = x.to(tl.float32), dy.to(tl.float32)
            acc = tl.dot(x, dy, acc, input_precision=PRECISION)
            x_ptr += DEPTH * x_stride
            dy_ptr += DEPTH * dy_stride
        out_ptr += part.to(tl.int64) * num_active * (B * B)
        where = (slot * (B * B) + gathered % B)[:, None] + outer[None, :] * B
        tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _find_chunk(row_ptr, num_rows, chunk, PER_CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """(row, first position in row order, number of blocks) of a chunk; a row beyond the last where there is none.

    Every program sums up the chunks of all rows for itself: a few hundred integers, no other launch, no host.
    """
    rows = tl.arange(0, ROWS)
    exists = rows < num_rows
    begins = tl.load(row_ptr + rows, mask=exists, other=0)
    lengths = tl.load(row_ptr + rows + 1, mask=exists, other=0) - begins
    chunks = (lengths + PER_CHUNK - 1) // PER_CHUNK
    ends = tl.cumsum(chunks, 0)
    row = tl.sum((ends <= chunk).to(tl.int32), 0)
    mine = rows == row
    done = (chunk - tl.sum(tl.where(mine, ends - chunks, 0), 0)) * PER_CHUNK
    begin = tl.sum(tl.where(mine, begins, 0), 0) + done
    length = tl.sum(tl.where(mine, lengths, 0), 0) - done
    return row, begin, tl.minimum(length, PER_CHUNK)


@triton.jit(do_not_specialize=["num_parts"])
def sum_parts_kernel(parts_ptr, out_ptr, num_parts, size, SIZE: tl.constexpr):
    """out[i] = sum over parts of parts[part, i], in fp32, rounded once."""
    where = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    here = where < size
    acc = tl.zeros((SIZE,), dtype=tl.float32)
    for _ in range(num_parts):
        acc += tl.load(parts_ptr + where, mask=here, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=here)
