"""What is done to a tile of logits, for CUDA: the three functions that kernels.py defines in plain torch, in Triton.

Plain torch goes over a tile once for the maximum, once to subtract it, once for exp, and so on; a tile of hundreds of
MB comes from the GPU's memory and goes back each time. Here `statistics` reads each logit once, and `gradient_` reads
and writes each once, in the logits' own dtype; between the two it is float32. torch.matmul makes the tiles.

Written after the online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). Not run on a GPU: tests run it in
Triton's interpreter on a CPU. Triton comes with torch for CUDA on Linux, and needs a C compiler when a kernel is first
used. KERNELS_TRITON=0 in the environment goes without.
"""

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 4096, 8          # logits that a program holds at a time, 16 for each of its 256 threads; a power of two


def statistics(logits, target, softcap):
    """As `kernels.statistics`: logits [t, v], rows contiguous, target [t] int64 -> (log sum exp, picked), both [t]
    float32. The logits stay."""
    lse, picked = torch.empty(2, len(logits), device=logits.device)
    _launch(_statistics, (len(logits),), logits, softcap, target, lse, picked)
    return lse, picked


def gradient_(logits, target, lse, coef, softcap):
    """As `kernels.gradient_`: logits [t, v], rows contiguous; target [t] int64, lse and coef [t] float32."""
    blocks = triton.cdiv(logits.shape[1], BLOCK)
    _launch(_gradient, (len(logits), blocks), logits, softcap, target, lse, coef)


def logprob_and_gradient_(logits, target, coef, softcap):
    """As `kernels.logprob_and_gradient_`: the two above, one after the other."""
    lse, picked = statistics(logits, target, softcap)
    gradient_(logits, target, lse, coef, softcap)
    return picked - lse


def _launch(kernel, grid, logits, softcap, *rows):
    """Runs a kernel on the logits and on tensors [t]. These may be views, such as the gradient of a sum, whose stride
    is 0."""
    with torch.cuda.device_of(logits):          # Triton launches on the current device, whichever the tensors are on
        kernel[grid](logits, *(row.contiguous() for row in rows), logits.stride(0), logits.shape[1], softcap or 1.0,
                     CAPPED=softcap is not None, BLOCK=BLOCK, num_warps=WARPS)


@triton.jit
def _tanh(x):
    """From exp, whose overflow to inf gives the right 1."""
    return 1 - 2 / (1 + tl.exp(2 * x))


@triton.jit
def _statistics(logits, target, lse, picked, stride, V, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row, block by block: the maximum so far, and in each lane a sum of exp(logit - maximum)."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    inside = (y >= 0) & (y < V)
    hit = tl.load(logits + row * stride + y, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        hit = cap * _tanh(hit / cap)
    tl.store(picked + row, hit)
    top = -1e30                                 # finite: exp(-inf - -inf) would be NaN
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + at, mask=at < V, other=0.0).to(tl.float32)
        if CAPPED:
            x = cap * _tanh(x / cap)
        x = tl.where(at < V, x, -1e30)
        new = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new) + tl.exp(x - new)
        top = new
    tl.store(lse + row, top + tl.log(tl.sum(total, 0)))


@triton.jit
def _gradient(logits, target, lse, coef, stride, V, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """One program a block of a row: logits <- coef (onehot(target) - softmax). A target outside the tile hits none."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = logits + row * stride + at
    x = tl.load(here, mask=at < V, other=0.0).to(tl.float32)
    slope = 1.0                                 # d capped / d logit
    if CAPPED:
        bent = _tanh(x / cap)
        x, slope = cap * bent, 1 - bent * bent
    onehot = (at == tl.load(target + row)).to(tl.float32)
    x = tl.load(coef + row) * (onehot - tl.exp(x - tl.load(lse + row))) * slope
    tl.store(here, x.to(logits.dtype.element_ty), mask=at < V)
