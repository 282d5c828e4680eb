// y[m, n] as stream_linear's, for many tokens: one group of warps fetches, others multiply.
//
// A block walks over tiles of ROWS output channels by TOKENS tokens. Its fetching warp has the copy
// engine fill a ring of stages with weights and activations. Warpgroups unpack their channels in
// registers, as the left operand of wgmma (or leave 8-bit ones where they are: multiply_whole.cuh). What
// one of them waits for, another one uses: unpacking and products overlap, and so does the end of a tile
// with the fetches for the next.
// (Clusters that share their activations by multicast were slower everywhere on an H200, by 10 to
// 40 %: blocks then wait for each other.) Where the last tiles, or all there are, leave multiprocessors
// idle, a cluster of SPLITS blocks splits k; its partial sums are added in a fixed order.

struct Arguments {
  __align__(64) char x[128];  // tensor map of [m, k]: 128 bytes of k by TOKENS, swizzled, as often as a stage has it
  char w[128];  // of the weight's tiles: what a stage has of them; ROW_MAJOR: of 64 rows of [n, k], as of x
  const float* x_scale;
  const int* x_zero;
  const float* w_scale;
  const float* w_sum;
  const void* bias;
  u16* y;
  int m, n, k;
};

// A fourth of the registers belongs to each scheduler of a multiprocessor, which has a warp of every
// group. The fetching group needs few: the others get its share.
constexpr int GROUPS = WARPS_N / 4 + 1;
constexpr int REGISTERS = 512 / (GROUPS * BLOCKS) / 8 * 8 < 240 ? 512 / (GROUPS * BLOCKS) / 8 * 8 : 240;
constexpr int FETCH_REGISTERS = 40;
constexpr int SHARE = (REGISTERS * GROUPS - FETCH_REGISTERS) / (GROUPS - 1) / 8 * 8;
constexpr int MULTIPLY_REGISTERS = SHARE < 240 ? SHARE : 240;
static_assert(Y_TYPE == 1 || Y_TYPE == 2, "y has 16 bits");

constexpr int TILES = WARPS_N * ROW_TILES;
constexpr int CONSUMERS = THREADS;
constexpr int BAND = 16;  // token tiles that are walked before the next channels: their x stays in L2

constexpr int PART = TOKENS % 32 == 0 ? 32 : 16;  // tokens that are written at once
constexpr int GROUP_ROWS = 64 * ROW_TILES;        // channels of a warpgroup
constexpr int PART_PITCH = 2 * GROUP_ROWS + 16;
constexpr int PART_BYTES = PART * PART_PITCH;
constexpr int PARTS_AT = STAGES * STAGE_BYTES;
constexpr int BARRIERS_AT = PARTS_AT + WARPS_N / 4 * PART_BYTES;

// Which of a block's tiles is tile ``r`` of a warp. Of 8-bit ones wgmma takes 64 rows as they follow each other: a
// tile of each of four warps.
__device__ __forceinline__ int tile_of(int warp, int r) {
  return ROW_MAJOR ? (warp / 4 * ROW_TILES + r) * 4 + warp % 4 : warp * ROW_TILES + r;
}

__device__ __forceinline__ void barrier_init(u32 at, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 at, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 at, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(at),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 at) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(at) : "memory");
}

__device__ __forceinline__ void prefetch_map(const char* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void fetch_tokens(u32 to, const char* map, int row, int part, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {0, %2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(row), "r"(part), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void fetch_rows(u32 to, const char* map, int row, int pair, int part, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {0, %2, 0, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(row), "r"(pair), "r"(part), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void fetch_tiles(u32 to, const char* map, int at, int part, int pair, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, 0, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(at), "r"(part), "r"(pair), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void group_sync(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// A position in the ring of stages, and in which of its two phases the ring is
struct Place {
  int stage = 0;
  u32 phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// The tiles of a block, in the order in which it takes them. While every block has one it takes it whole; of
// what is left each cluster takes one tile, and every block of it a part of k, if there are clusters enough.
struct Walk {
  int tiles_n, tiles_m, tile, whole;
  bool split = false;
  __device__ __forceinline__ Walk(const Arguments& p)
      : tiles_n((p.n + ROWS - 1) / ROWS), tiles_m((p.m + TOKENS - 1) / TOKENS), tile(blockIdx.x) {
    whole = tiles_n * tiles_m / gridDim.x * gridDim.x;
    share();
  }
  __device__ __forceinline__ void share() {
    if (SPLITS == 1 || tile < whole || (tiles_n * tiles_m - whole) * SPLITS > gridDim.x) return;
    split = true;
    tile = whole + blockIdx.x / SPLITS;
  }
  __device__ __forceinline__ bool more() const { return tile < tiles_n * tiles_m; }
  __device__ __forceinline__ void next() {
    tile += gridDim.x;
    if (!split) share();
  }
  // Its stages: the first, and the one after stage ``i``; halves of a unit stay together
  __device__ __forceinline__ int first() const { return (split ? blockIdx.x % SPLITS : 0) * (HALVED ? 2 : 1); }
  __device__ __forceinline__ int after(int i) const {
    const int further = split ? SPLITS : 1;
    if (!HALVED) return i + further;
    return i % 2 == 0 ? i + 1 : i - 1 + 2 * further;
  }
  __device__ __forceinline__ int2 at() const {  // (channels, tokens), in tiles
    const int band = tile / (BAND * tiles_n), inside = tile - band * BAND * tiles_n;
    const int width = min(BAND, tiles_m - band * BAND);
    return make_int2(inside / width, band * BAND + inside % width);
  }
};

// Where in k stage ``i`` begins, in steps
__device__ __forceinline__ int step_of(int i) { return HALVED ? i ^ 1 : i; }

// Pieces of a tile's bytes in a stage, as large as a box may be (cuda_pipeline.py)
__device__ __forceinline__ constexpr int pieces() {
  int count = 1;
  while (STEP_BYTES / count > 2048 || STEP_BYTES % (16 * count) != 0) ++count;
  return count;
}
constexpr int PIECES = pieces();

// What stage ``i`` has of the weight's tiles at ``place`` (Walk::at). One instruction for all: with one for each tile the copy
// engine held up what multiplies. (An H200, 256 rows of 4096 x 14336 in int4wo-64: 47.4 and 43.3 us.)
__device__ __forceinline__ void fetch_weights(const Arguments& p, u32 to, int place, int i, u32 barrier, u64 policy, int lane) {
  // Gated, tiles of both halves are in turns: the maps have pairs.
  if constexpr (ROW_MAJOR) {
    const int tile = place * TILES + lane * 4;
    if (lane < TILES / 4)
      fetch_rows(to + lane * 4 * STEP_BYTES, p.w, GATED ? 0 : tile * 16, GATED ? tile / 2 : 0, i * (STEP / 128), barrier, policy);
  } else if (lane == 0) {
    const int at = HALVED && i % 2 == 0 ? HALF_BYTES / 8 : 0, part = HALVED ? i / 2 : i * PIECES;
    fetch_tiles(to, p.w, at, part, place * (GATED ? TILES / 2 : TILES), barrier, policy);
  }
}

// Whether the last tile was split. (Weights are nobody's output, as x is; but more than one stage of them before the
// previous kernel has ended slowed nearly all short ones, by up to 20 %.)
__device__ __forceinline__ bool fetch(const Arguments& p, u32 ring, u32 full, u32 empty, int lane) {
  const int steps = p.k / STEP;
  const u64 again = keep_policy(true), weights_policy = keep_policy(p.m > TOKENS);
  bool waited = false, split = false;
  Place place;
  for (Walk walk(p); walk.more(); walk.next()) {
    const int2 at = walk.at();
    split = walk.split;
    for (int i = walk.first(); i < steps; i = walk.after(i)) {
      const u32 stage = ring + place.stage * STAGE_BYTES, barrier = full + 8 * place.stage;
      barrier_wait(empty + 8 * place.stage, place.phase ^ 1);
      if (lane == 0) barrier_expect(barrier, X_BYTES + TILES * STEP_BYTES);
      __syncwarp();
      fetch_weights(p, stage + X_BYTES, at.x, i, barrier, weights_policy, lane);
      if (!waited) wait_for_previous_kernel(), waited = true;
      if (lane == 0) fetch_tokens(stage, p.x, at.y * TOKENS, step_of(i) * (X_ROW / 128), barrier, again);
      place.next();
    }
  }
  let_next_kernel_begin();
  return split;
}

// The activation of eight numbers times eight others, of y's type as all that is written to shared memory
__device__ __forceinline__ Words<4> gate(const Words<4>& a, const Words<4>& b) {
  Words<4> v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v.w[i] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = widen(static_cast<u16>(a.w[i] >> (16 * half)), Y_TYPE);
      const float y = widen(static_cast<u16>(b.w[i] >> (16 * half)), Y_TYPE);
      v.w[i] |= static_cast<u32>(narrow(activate(x) * y, Y_TYPE)) << (16 * half);
    }
  }
  return v;
}

// The sums of a warpgroup to y, by way of shared memory, where tokens become rows
__device__ __forceinline__ void write(const Arguments& p, u32 part, int2 at, int warp, int lane, const Sums& sums) {
  const int group = warp / 4, in_group = warp % 4 * 32 + lane;
  const int first_token = at.y * TOKENS;
  const int first_tile = at.x * TILES + group * 4 * ROW_TILES, outputs = GATED ? p.n / 2 : p.n;
  float scale[ROW_TILES][2], bias[ROW_TILES][2], w_sum[ROW_TILES][2];
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile = tile_at(at.x * TILES + tile_of(warp, r), p.n);
      const int n = min(tile * 16 + lane / 4 + 8 * half, p.n - 1);
      scale[r][half] = SCALED ? p.w_scale[n] * SUM_FACTOR : 1.0f;
      w_sum[r][half] = X_ZERO ? p.w_sum[n] : 0.0f;
      bias[r][half] = bias_at(p.bias, n);
    }
#pragma unroll
  for (int first = 0; first < TOKENS; first += PART) {
    if (first_token + first >= p.m) break;
    group_sync(group);
#pragma unroll
    for (int j = first / 8; j < (first + PART) / 8; j += 2) {
      float x_scale[2][2], x_zero[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = min(first_token + 8 * (j + i / 2) + 2 * (lane % 4) + i % 2, p.m - 1);
        x_scale[i / 2][i % 2] = X_SCALED ? p.x_scale[token] : 1.0f;
        x_zero[i / 2][i % 2] = X_ZERO ? p.x_zero[token] : 0.0f;
      }
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        u32 pair[4];  // 8 x 8: channels on and on, of 8 tokens, then of the next 8
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i % 2;
          float y[2];
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            const float sum = sums[r][j + i / 2][2 * half + t];
            y[t] = scaled(sum, x_scale[i / 2][t], x_zero[i / 2][t], scale[r][half], w_sum[r][half], bias[r][half]);
            if (!GATED) y[t] = activate(y[t]);
          }
          pair[i] = narrow(y[0], Y_TYPE) | static_cast<u32>(narrow(y[1], Y_TYPE)) << 16;
        }
        const int token = 8 * (j + lane / 16) - first + lane % 8;
        const u32 to = part + token * PART_PITCH + 2 * (tile_of(warp, r) % (4 * ROW_TILES) * 16 + lane / 8 % 2 * 8);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(pair[0]),
                     "r"(pair[1]), "r"(pair[2]), "r"(pair[3])
                     : "memory");
      }
    }
    group_sync(group);
    constexpr int PER_TOKEN = GROUP_ROWS / (GATED ? 16 : 8);
#pragma unroll
    for (int i = in_group; i < PART * PER_TOKEN; i += 128) {
      const int token = i / PER_TOKEN, piece = i % PER_TOKEN;
      const int m = first_token + first + token, n = first_tile * (GATED ? 8 : 16) + piece * 8;
      const u32 from = part + token * PART_PITCH + 2 * row_of(piece * 8);
      Words<4> v = load_shared<4>(from);
      if (GATED) v = gate(v, load_shared<4>(from + 32));
      if (m >= p.m || n >= outputs) continue;
      u16* to = p.y + static_cast<u64>(m) * outputs + n;
      if (outputs % 8 == 0) {
        *reinterpret_cast<uint4*>(to) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
      } else {
#pragma unroll
        for (int c = 0; c < 8; ++c)
          if (n + c < outputs) to[c] = static_cast<u16>(v.w[c / 2] >> (c % 2 * 16));
      }
    }
  }
}

// Partial sums of a cluster's blocks meet as [token][channel] where the ring was: a tile that is split is the
// last. Every block adds a share of them, four channels at a time.
__device__ __forceinline__ void reduce(const Arguments& p, u32 memory, int2 at, int warp, int lane, const Sums& sums) {
  constexpr int PITCH = ROWS + 4;
  asm volatile("bar.sync 8, %0;" ::"n"(CONSUMERS) : "memory");  // nobody reads the ring any more
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * j + 2 * (lane % 4) + i % 2, row = tile_of(warp, r) * 16 + lane / 4 + 8 * (i / 2);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(memory + 4 * (token * PITCH + row)), "r"(bits_of(sums[r][j][i]))
                     : "memory");
      }
  cluster_barrier();
  const int first_token = at.y * TOKENS, tokens = min(TOKENS, p.m - first_token);
  const int outputs = GATED ? p.n / 2 : p.n;
#pragma unroll 2
  for (int i = blockIdx.x % SPLITS * CONSUMERS + threadIdx.x; i < tokens * (OUTPUTS / 4); i += SPLITS * CONSUMERS) {
    const int token = i / (OUTPUTS / 4), output = i % (OUTPUTS / 4) * 4, n = at.x * OUTPUTS + output;
    const int m = first_token + token;
    if (n >= outputs) continue;
    Sum sum[GATED ? 2 : 1][4] = {};
#pragma unroll
    for (int half = 0; half < (GATED ? 2 : 1); ++half)
#pragma unroll
      for (int part = 0; part < SPLITS; ++part) {
        const u32 from = remote_address(memory + 4 * (token * PITCH + row_of(output) + 16 * half), part);
        u32 v[4];
        asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(from)
                     : "memory");
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[half][c] += sum_of(v[c]);
      }
    u16* to = p.y + static_cast<u64>(m) * outputs + n;
    u16 y[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      auto total = [&](int row) { return static_cast<float>(sum[GATED && row != row_of(output + c)][c]); };
      y[c] = narrow(result_at(p, total, m, min(n + c, outputs - 1), output + c), Y_TYPE);
    }
    if (outputs % 4 == 0) {
      *reinterpret_cast<uint2*>(to) = make_uint2(y[0] | static_cast<u32>(y[1]) << 16, y[2] | static_cast<u32>(y[3]) << 16);
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (n + c < outputs) to[c] = y[c];
    }
  }
}

__device__ __forceinline__ void consume(const Arguments& p, u32 memory, u32 full, u32 empty, int warp, int lane) {
  const int steps = p.k / STEP;
  // of the warpgroup where it reads its weights together, by an address that is the same for all lanes
  const int first = ROW_MAJOR ? __shfl_sync(~0u, warp / 4 * 4, 0) : warp;
  Place place;
  wait_for_previous_kernel();
  // wgmma still reads a stage after ``multiply``: it is free once the next one's first products are.
  auto release = [&](int stage) {
    __syncwarp();  // every lane has read its weights
    if (lane == 0) barrier_arrive(empty + 8 * stage);
  };
  for (Walk walk(p); walk.more(); walk.next()) {
    Sums sums = {};
    int before = -1;
#pragma unroll 1  // copies of it would have to move the sums, and ptxas would have products wait for each other
    for (int i = walk.first(); i < steps; i = walk.after(i)) {
      barrier_wait(full + 8 * place.stage, place.phase);
      const u32 stage = memory + place.stage * STAGE_BYTES;
      const u32 weights = stage + X_BYTES + first * W_BYTES;
      const u32 qparams = HALVED && i % 2 != 0 ? weights + (before - place.stage) * STAGE_BYTES : weights;
      multiply(weights, qparams, stage, lane, 0, sums);
      if (before >= 0) release(before);
      before = place.stage;
      place.next();
    }
    end_products<0>();
    settle(sums);
    if (walk.split) {
      reduce(p, memory, walk.at(), warp, lane, sums);
    } else {
      release(before);
      write(p, memory + PARTS_AT + warp / 4 * PART_BYTES, walk.at(), warp, lane, sums);
    }
  }
}

extern "C" __global__ void __cluster_dims__(SPLITS, 1, 1) __launch_bounds__(128 * GROUPS, BLOCKS)
    pipeline_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(1024) char dynamic[];
  const u32 memory = shared_address(dynamic), full = memory + BARRIERS_AT, empty = full + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == CONSUMERS) prefetch_map(p.w), prefetch_map(p.x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, WARPS_N);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // for the copy engine too
  }
  __syncthreads();
  if (warp >= WARPS_N) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FETCH_REGISTERS));
    bool split = false;
    if (warp == WARPS_N)
      split = fetch(p, memory, full, empty, lane);
    else if (SPLITS > 1)
      for (Walk walk(p); walk.more(); walk.next()) split = walk.split;
    __syncwarp();
    if (split) cluster_barrier();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLY_REGISTERS));
    consume(p, memory, full, empty, warp, lane);
    __syncwarp();
  }
  if (SPLITS > 1) cluster_barrier();  // its sums may still be read
}
