// One stage of the pipeline where both operands are 8 bits wide and stay in shared memory: for each of a
// warpgroup's tiles of 64 rows, 128 bytes of k after another, swizzled as the activations are.

// 32 bytes of k number ``index``, for 64 rows of the weight: added to a descriptor
__device__ __forceinline__ constexpr u64 weight_slice(int index) {
  return (index / 4 * 64 * 128 + index % 4 * 32) >> 4;
}

__device__ __forceinline__ void multiply_onto(u32 weights, u32 x, Sums& sums) {
  begin_products();
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int block = 0; block < STEP / 32; ++block)
      product64(sums[r], descriptor(weights + r * 64 * STEP) + weight_slice(block), descriptor(x) + slice(block), 1);
  end_products<1>();
}

// Float8 sums have 14 bits inside the tensor core: after 128 products they move on to float32.
__device__ __forceinline__ void multiply_apart(u32 weights, u32 x, Sums& sums) {
  typedef Sum Part[TOKEN_TILES][4];
  auto begin = [&](int i, Part& part) {
    const u64 left = descriptor(weights + i % ROW_TILES * 64 * STEP);
    begin_products();
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      const int at = i / ROW_TILES * 4 + block;
      product64(part, left + weight_slice(at), descriptor(x) + slice(at), block != 0);
    }
  };
  auto move = [&](int i, Part& part) {
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[i % ROW_TILES][j][c] += part[j][c];
  };
  in_turns<STEP / 128 * ROW_TILES, Sum>(begin, move);
}

__device__ __forceinline__ void multiply(u32 weights, u32 qparams, u32 x, int lane, u32 base, Sums& sums) {
  if constexpr (FLOAT8)
    multiply_apart(weights, x, sums);
  else
    multiply_onto(weights, x, sums);
}
