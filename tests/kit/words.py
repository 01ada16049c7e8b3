"""The Philox words and normal numbers of the noising kernel, by themselves. Imports Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbtrain_kernels.noising_triton import four_normals, philox_words


@triton.jit
def store_words(key, counter, words, normals, count, BLOCK: tl.constexpr):
    """Words [4, count] and normal numbers [4, count] of counters [4, count] under one key."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    k0, k1 = tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32)
    c0 = tl.load(counter + i, mask=inside, other=0).to(tl.uint32)
    c1 = tl.load(counter + count + i, mask=inside, other=0).to(tl.uint32)
    c2 = tl.load(counter + 2 * count + i, mask=inside, other=0).to(tl.uint32)
    c3 = tl.load(counter + 3 * count + i, mask=inside, other=0).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(k0, k1, c0, c1, c2, c3)
    z0, z1, z2, z3 = four_normals(k0, k1, c0, c1, c2, c3)
    tl.store(words + i, w0.to(tl.int64), mask=inside)
    tl.store(words + count + i, w1.to(tl.int64), mask=inside)
    tl.store(words + 2 * count + i, w2.to(tl.int64), mask=inside)
    tl.store(words + 3 * count + i, w3.to(tl.int64), mask=inside)
    tl.store(normals + i, z0, mask=inside)
    tl.store(normals + count + i, z1, mask=inside)
    tl.store(normals + 2 * count + i, z2, mask=inside)
    tl.store(normals + 3 * count + i, z3, mask=inside)


def draw(key: tuple[int, int], counter_4n: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel's words [4, n] (int64) and normal numbers [4, n] (float32) for counters [4, n] (int64)."""
    count = counter_4n.shape[1]
    words, normals = torch.empty_like(counter_4n), torch.empty_like(counter_4n, dtype=torch.float32)
    key_2 = torch.tensor(key, device=counter_4n.device)
    store_words[(triton.cdiv(count, 1024),)](key_2, counter_4n.contiguous(), words, normals, count, BLOCK=1024)
    return words, normals
