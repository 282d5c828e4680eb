// The constants a kernel is compiled for, all integers (cuda_stream.py sets them), and what follows:
//   BITS of a weight; FLOAT8: whether the 8 bits are e4m3; X_BITS of an activation (16 or 8);
//   X_HALF: 16-bit activations are float16, not bfloat16; CHUNK: k that share qparams (0: none
//   inside the stream); ZERO: the qparams have a zero point; X_ZERO: activations have one;
//   WIDENED: the activations' 8-bit codes come as 16-bit floats, the weight lies as for 8-bit products;
//   TOKENS of a block of threads (1, or a multiple of 8), ROW_TILES of a warp, WARPS_N, WARPS_K,
//   STEP (k of a pipeline stage), STAGES; WARPGROUP: four warps multiply together (wgmma);
//   BLOCKS of threads that a multiprocessor should hold; SPLITS; FIXED: the one row of activations is
//   made fixed-point numbers (fixed.cuh), all of it before the first product; X_TYPE: or codes, out
//   of numbers of this type (quantize.cuh; 0: 8-bit activations come as codes);
//   X_TYPE, Y_TYPE, BIAS_TYPE: 0 none, 1 bfloat16, 2 float16, 3 float32; ACTIVATION: 0 none, 1 relu,
//   2 gelu, 3 gelu_tanh, 4 silu; GATED: the activation of the first half of the channels times the
//   second half is the result.

#ifndef FETCHED  // 1 where the copy engine fills the stages: the source of such a kernel begins with it
#define FETCHED 0
#endif

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int TOKEN_TILES = (TOKENS + 7) / 8;
constexpr int COLUMNS = 8 * TOKEN_TILES;  // one token alone is one of eight
constexpr int ROWS = 16 * ROW_TILES * WARPS_N;
constexpr int GROUP_THREADS = 32 * WARPS_N;  // the warps that share a part of k, and its activations
constexpr int THREADS = GROUP_THREADS * WARPS_K;
constexpr bool INTEGER = X_BITS == 8 && !FLOAT8;
constexpr bool X_SCALED = X_BITS == 8 || WIDENED;
constexpr bool GROUPED = CHUNK != 0;
constexpr int OUTPUTS = GATED ? ROWS / 2 : ROWS;  // channels of y that a block makes

// Whether the next kernel may begin while this one ends. Behind a linear of many tokens comes a norm or a quantization,
// a block for each of them: where those begin early several share a multiprocessor. (An H200, a step of four layers of
// Llama-3-8B's shape: int4wo-64 at 16 tokens 385 us so and 390 not, at 64 tokens 628 and 607; 8da4w-128 363 and 352, 538
// and 511.)
constexpr bool EARLY = TOKENS == 1 || (TOKENS <= 16 && X_BITS == 16);

// Where in the weight a block's tile is. Gated, a block has tiles of both halves, in turns.
__device__ __forceinline__ int tile_at(int tile, int n) {
  return GATED ? tile % 2 * (n / 32) + tile / 2 : tile;
}

constexpr int BLOCK_BYTES = 64 * BITS;  // 16 rows, 32 k
constexpr int QPARAM_BYTES = GROUPED ? (ZERO ? 64 : 32) : 0;
constexpr int UNIT = GROUPED ? CHUNK : 32;
constexpr int UNIT_BYTES = UNIT / 32 * BLOCK_BYTES + QPARAM_BYTES;

// A stage may have half a unit: first the second half, which the qparams follow, then the first one.
constexpr bool HALVED = UNIT == 2 * STEP;
static_assert(!HALVED || (X_BITS == 16 && FETCHED), "integers in groups, and threads that copy, take whole units");
constexpr int HALF_BYTES = STEP / 32 * BLOCK_BYTES;

// What threads copy lies in shared memory as it does in lines of 128 bytes in memory: two parts of a line in two
// lines are two writes. (An H200, one row of 28672 x 4096 8-bit weights, 16 bytes off: 31.1 us instead of 27.7.)
__device__ __forceinline__ constexpr int whole_lines(int bytes) { return (bytes + 127) / 128 * 128; }

// Rows of activations start an odd multiple of 16 bytes apart, so that the eight rows of a matrix
// that ldmatrix reads meet different banks. wgmma reads rows of 128 bytes, swizzled.
constexpr int X_ROW = STEP * X_BITS / 8;
constexpr int STRIDE = X_ROW + 16;
constexpr bool MADE = FIXED || X_TYPE != 0;  // by each block for itself, beside the stages
constexpr int X_BYTES = MADE ? 0 : WARPGROUP ? TOKENS * X_ROW : whole_lines(TOKENS * STRIDE);

// 8-bit products need no unpacking: their weight stays as it is, [n, k], which other kernels share,
// and is read as the activations are; whole lines of it are swizzled instead.
constexpr bool ROW_MAJOR = BITS == 8 && X_BITS == 8;
constexpr bool SWIZZLED = ROW_MAJOR && STEP % 128 == 0;
constexpr int WHOLE_UNITS = STEP / UNIT * UNIT_BYTES;
constexpr int PIECE_ROW = ROW_MAJOR ? STEP : HALVED ? HALF_BYTES + QPARAM_BYTES : WHOLE_UNITS;  // contiguous in memory
constexpr int PIECE_STRIDE = FETCHED ? PIECE_ROW : ROW_MAJOR && !SWIZZLED ? STRIDE : whole_lines(PIECE_ROW);
constexpr int PIECE_ROWS = ROW_MAJOR ? 16 : 1;  // of them in a tile
constexpr int STEP_BYTES = PIECE_ROWS * PIECE_STRIDE;
constexpr int W_BYTES = ROW_TILES * STEP_BYTES;  // of a warp and a stage
constexpr int STAGE_BYTES = WARPGROUP ? (X_BYTES + WARPS_N * W_BYTES + 1023) / 1024 * 1024 : X_BYTES + WARPS_N * W_BYTES;
constexpr int AHEAD = STAGES - (WARPGROUP ? 2 : 1);  // wgmma may still read the stage before
