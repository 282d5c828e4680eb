// One stage of the pipeline: weights out of shared memory, unpacked in registers, times activations in shared
// memory, onto the sums of a warp. ``qparams``: the weights of the stage which has those of half a unit.

// Where the lanes' rows of 16 bytes are, for ldmatrix of 8 tokens from that piece of theirs on. One token is the
// first column; the others, which nobody looks at, are other pieces of it, so that no two rows share a bank.
__device__ __forceinline__ u32 token_address(int lane, int piece) {
  constexpr int PIECES = X_ROW / 16 < 8 ? X_ROW / 16 : 8;
  static_assert(TOKENS > 1 || (X_ROW & (X_ROW - 1)) == 0, "other pieces of the same row");
  if (TOKENS == 1) return ((piece + lane / 8) ^ (lane % 8 % PIECES)) * 16;
  return lane % 8 * STRIDE + (piece + lane / 8) * 16;
}

#if X_BITS == 16

// multiply, where sums are scaled
__device__ __forceinline__ void multiply_codes(u32 weights, u32 x, int lane, u32 base, Sums& sums) {
  const u32 ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
  for (int chunk = 0; chunk < STEP / UNIT; ++chunk) {
    float part[ROW_TILES][TOKEN_TILES][4] = {}, x_sum[TOKEN_TILES][4] = {};
#pragma unroll
    for (int block = 0; block < UNIT / 32; ++block) {
      u32 a[ROW_TILES][2][4];
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        const u32 at = weights + r * STEP_BYTES + chunk * UNIT_BYTES + block * BLOCK_BYTES;
        widen_weights(load_shared<BITS / 2>(at + lane * (BLOCK_BYTES / 32)), Qparams(), base, a[r]);
      }
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; ++j) {
        const u32 from = x + token_address(lane, (chunk * (UNIT / 32) + block) * 4) + j * 8 * STRIDE;
        const Words<4> b = load_matrices<4>(from);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          product16(x_sum[j], ones, b.w[2 * s], b.w[2 * s + 1]);
#pragma unroll
          for (int r = 0; r < ROW_TILES; ++r) product16(part[r][j], a[r][s], b.w[2 * s], b.w[2 * s + 1]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const Qparams q = load_qparams(weights + r * STEP_BYTES + (chunk + 1) * UNIT_BYTES - QPARAM_BYTES, lane >> 2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float scale = __uint_as_float(q.scale[half]);
        const float shift = fmaf(-OFFSET, scale, __uint_as_float(q.zero[half]));
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
          for (int i = 0; i < (TOKENS == 1 ? 1 : 2); ++i) {
            float& sum = sums[r][j][2 * half + i];
            sum = fmaf(scale, part[r][j][2 * half + i], fmaf(shift, x_sum[j][i], sum));
          }
      }
    }
  }
}

// Block number ``block`` of a tile, with the qparams of the unit that it begins or goes on with
__device__ __forceinline__ void unpack(u32 tile, u32 qparams, int block, int lane, Qparams& q, u32 (&a)[2][4]) {
  const u32 unit = tile + block / (UNIT / 32) * UNIT_BYTES, follow = HALVED ? HALF_BYTES : UNIT_BYTES - QPARAM_BYTES;
  if (GROUPED && block % (UNIT / 32) == 0) q = load_qparams(unit - tile + qparams + follow, lane >> 2);
  const u32 mine = unit + block % (UNIT / 32) * BLOCK_BYTES + lane * (BLOCK_BYTES / 32);
  widen_weights(load_shared<BITS / 2>(mine), q, 0, a);
}

// Blocks that are unpacked before their products begin: of few tokens two, whose latencies overlap
constexpr int AT_ONCE = TOKENS <= 32 && STEP % 128 == 0 ? 2 : 1;
// wgmma reads its left operand from registers until it is done, one group of products behind: what the next
// stage unpacks first must not be what this one unpacked last.
static_assert(!WARPGROUP || STEP / 32 / AT_ONCE % 2 == 0, "groups of products take turns");

__device__ __forceinline__ void multiply(u32 weights, u32 qparams, u32 x, int lane, u32 base, Sums& sums) {
  if (SCALE_SUMS) return multiply_codes(weights, x, lane, base, sums);
  Qparams q[ROW_TILES];
#if WARPGROUP
#pragma unroll
  for (int first = 0; first < STEP / 32; first += AT_ONCE) {
    u32 a[AT_ONCE][ROW_TILES][2][4];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) unpack(weights + r * STEP_BYTES, qparams + r * STEP_BYTES, first + i, lane, q[r], a[i][r]);
    begin_products();
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int s = 0; s < 2; ++s) product64(sums[r], a[i][r][s], descriptor(x) + slice(2 * (first + i) + s), 1);
    end_products<1>();
  }
#else
#pragma unroll
  for (int block = 0; block < STEP / 32; ++block) {
    u32 a[ROW_TILES][2][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) unpack(weights + r * STEP_BYTES, qparams + r * STEP_BYTES, block, lane, q[r], a[r]);
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) {
      const Words<4> b = load_matrices<4>(x + token_address(lane, block * 4) + j * 8 * STRIDE);
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        product16(sums[r][j], a[r][0], b.w[0], b.w[1]);
        product16(sums[r][j], a[r][1], b.w[2], b.w[3]);
      }
    }
  }
#endif
}

#else  // X_BITS == 8

// Block number ``block`` of a tile as the left operand of a k32 product
__device__ __forceinline__ void load_weights(u32 tile, int block, int lane, u32 (&a)[4]) {
#if BITS == 8  // 16 rows, two columns: the matrices are a0, a1 (rows 8 on), a2 (column 1), a3
  const int piece = 2 * block + lane / 16;
  const Words<4> w = load_matrices<4>(tile + lane % 16 * PIECE_STRIDE + (SWIZZLED ? piece ^ lane % 8 : piece) * 16);
  a[0] = w.w[0], a[1] = w.w[1], a[2] = w.w[2], a[3] = w.w[3];
#else  // a nibble in the high half of a byte is 16 times its value: no sign to extend
  const Words<2> w = load_shared<2>(tile + block * BLOCK_BYTES + lane * 8);
  a[0] = w.w[0] & 0xf0f0f0f0u, a[2] = (w.w[0] << 4) & 0xf0f0f0f0u;
  a[1] = w.w[1] & 0xf0f0f0f0u, a[3] = (w.w[1] << 4) & 0xf0f0f0f0u;
#endif
}

#if CHUNK == 0

__device__ __forceinline__ void multiply(u32 weights, u32 qparams, u32 x, int lane, u32 base, Sums& sums) {
#pragma unroll
  for (int block = 0; block < STEP / 32; ++block) {
    u32 a[ROW_TILES][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) load_weights(weights + r * STEP_BYTES, block, lane, a[r]);
#if WARPGROUP
    begin_products();
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) product64(sums[r], a[r], descriptor(x) + slice(block), 1);
    end_products<1>();
#else
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) {
      const Words<2> b = load_matrices<2>(x + token_address(lane % 16, block * 2) + j * 8 * STRIDE);
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) product8(sums[r][j], a[r], b.w[0], b.w[1]);
    }
#endif
  }
}

#else  // integers in groups

// An integer below 2^22 added to 1.5 * 2^23 is the float of that sum, bit for bit: the accumulator
// starts there, and leaves as a float by one subtraction.
constexpr int MAGIC = 0x4b400000;

constexpr int DEPTH = UNIT / 32;

// The scales of a lane's two rows; codes are 16 times their value.
__device__ __forceinline__ void load_scales(u32 unit, int lane, float (&scale)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u16 s;
    const u32 row = (lane >> 2) + 8 * half;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(s) : "r"(unit + UNIT_BYTES - QPARAM_BYTES + 2 * row));
    scale[half] = widen(s, 1) * 0.0625f;
  }
}

#if WARPGROUP

__device__ __forceinline__ void multiply(u32 weights, u32 qparams, u32 x, int lane, u32 base, Sums& sums) {
  typedef int Part[TOKEN_TILES][4];
  u32 a[PARTS][DEPTH][4];
  float scale[PARTS][2];
  auto begin = [&](int i, Part& part) {
    const int chunk = i / ROW_TILES, at = i % PARTS;
    const u32 unit = weights + i % ROW_TILES * STEP_BYTES + chunk * UNIT_BYTES;
#pragma unroll
    for (int block = 0; block < DEPTH; ++block) load_weights(unit, block, lane, a[at][block]);
    load_scales(unit, lane, scale[at]);
    begin_products();
#pragma unroll
    for (int block = 0; block < DEPTH; ++block)
      product64(part, a[at][block], descriptor(x) + slice(chunk * DEPTH + block), block != 0);
  };
  auto move = [&](int i, Part& part) {
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        sums[i % ROW_TILES][j][c] += scale[i % PARTS][c / 2] * static_cast<float>(part[j][c]);
  };
  in_turns<STEP / UNIT * ROW_TILES, int>(begin, move);
}

#else

__device__ __forceinline__ void multiply(u32 weights, u32 qparams, u32 x, int lane, u32 base, Sums& sums) {
#pragma unroll
  for (int chunk = 0; chunk < STEP / UNIT; ++chunk) {
    u32 a[ROW_TILES][DEPTH][4];
    float scale[ROW_TILES][2];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const u32 at = weights + r * STEP_BYTES + chunk * UNIT_BYTES;
#pragma unroll
      for (int block = 0; block < DEPTH; ++block) load_weights(at, block, lane, a[r][block]);
      load_scales(at, lane, scale[r]);
    }
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) {
      Words<2> b[DEPTH];
#pragma unroll
      for (int block = 0; block < DEPTH; ++block)
        b[block] = load_matrices<2>(x + token_address(lane % 16, (chunk * DEPTH + block) * 2) + j * 8 * STRIDE);
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        int part[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
#pragma unroll
        for (int block = 0; block < DEPTH; ++block) product8(part, a[r][block], b[block].w[0], b[block].w[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[r][j][i] += scale[r][i / 2] * (__int_as_float(part[i]) - __int_as_float(MAGIC));
      }
    }
  }
}

#endif
#endif
#endif  // X_BITS
