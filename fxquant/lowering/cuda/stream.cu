// y[m, n] = activation(x_scale[m] * w_scale[n] * sum_k x[m, k] w[n, k] + bias[n]) for few rows m: the
// weight streams once from memory into registers as the left operand of mma, 16 rows of it at a
// time, and the tokens are the 8 columns of the right operand. (GATED: y[m, n / 2], of the two halves.)
//
// The weight lies in memory as the lanes of a warp want it (cuda_layout.py packs it; but see
// ROW_MAJOR): for 16 output channels ("a tile") and 32 values of k, lane 4 g + t holds of the rows g
// and g + 8 the eight k that the fragments of mma and wgmma give it. Such blocks follow each other
// along k; after each chunk come the qparams of its groups. So every copy is contiguous,
// asynchronous and 16 bytes wide, and each warp waits for its own.
//
// A block of threads is WARPS_N x WARPS_K warps: the first split the channels, the second k, which a
// cluster of SPLITS blocks splits further. Partial sums are added in a fixed order, so results are
// the same from run to run.

struct Arguments {
  const char* x;  // [m, k], rows of ldx bytes
  const float* x_scale;
  const int* x_zero;
  const char* weight;
  const float* w_scale;
  const float* w_sum;
  const void* bias;
  void* y;
  int m, n, k, ldx;
  u32 base;  // BASE or SIGNS: a constant that the compiler knew it would load again for every use
};

// Of a block's shared memory, what does not depend on k: the stages, or the partial sums that follow them
constexpr int RING_BYTES = WARPS_K * STAGES * STAGE_BYTES, SUMS_BYTES = WARPS_K * COLUMNS * (ROWS + 4) * 4;
constexpr int SHARED_BYTES = RING_BYTES > SUMS_BYTES ? RING_BYTES : SUMS_BYTES;
constexpr int MADE_BYTES = FIXED ? FIXED_BYTES : STEP;  // of STEP activations, behind those

extern "C" __global__ void __cluster_dims__(1, 1, SPLITS) __launch_bounds__(THREADS, BLOCKS) stream_linear(const Arguments p) {
  extern __shared__ __align__(1024) char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int in_group = threadIdx.x % GROUP_THREADS;
  const int warp_n = warp % WARPS_N, group = warp / WARPS_N;
  const int steps = p.k / STEP;
  const int first_tile = (blockIdx.x * WARPS_N + warp_n) * ROW_TILES;
  const int first_token = blockIdx.y * TOKENS;
  constexpr int PARTS_K = SPLITS * WARPS_K;
  const int part_k = blockIdx.z * WARPS_K + group;
  const int my_steps = max(0, (steps - part_k + PARTS_K - 1) / PARTS_K);
  const u32 ring = shared_address(memory) + group * (STAGES * STAGE_BYTES);
  const u64 once = keep_policy(false), again = keep_policy(true);

  // A warp fetches its own weights. Rows past the last are the last again: computed, never stored.
  constexpr int PIECES = ROW_TILES * PIECE_ROWS * PIECE_ROW / 16;  // 16 bytes each
  constexpr int ROUNDS = (PIECES + 31) / 32;
  const u32 row_bytes = ROW_MAJOR ? p.k : p.k / UNIT * UNIT_BYTES;
  const int last = ROW_MAJOR ? p.n - 1 : (p.n + 15) / 16 - 1;
  u32 from[ROUNDS], to[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    const int at = (i * 32 + lane) * 16, row = at / PIECE_ROW, part = at % PIECE_ROW;
    const int tile = tile_at(first_tile + row / PIECE_ROWS, p.n);
    from[i] = min(tile * PIECE_ROWS + row % PIECE_ROWS, last) * row_bytes + part;
    to[i] = row * PIECE_STRIDE + (SWIZZLED ? part ^ row % 8 * 16 : part);
  }
  // Of step ``i``: how far from the beginning of a line it begins
  constexpr int LEAST = PIECE_ROW & -PIECE_ROW;
  static_assert(ROW_MAJOR || LEAST >= 128 || PIECE_ROW + 128 - LEAST <= PIECE_STRIDE, "room for what is off a line");
  auto off_line = [&](int i) { return ROW_MAJOR || LEAST >= 128 ? 0 : (part_k + i * PARTS_K) * PIECE_ROW % 128; };
  auto fetch_weights = [&](int i) {
    const u32 stage = ring + i % STAGES * STAGE_BYTES + X_BYTES + warp_n * W_BYTES + off_line(i);
    const char* base = p.weight + static_cast<u64>(part_k + i * PARTS_K) * PIECE_ROW;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round)
      if (round * 32 + lane < PIECES) copy_async(stage + to[round], base + from[round], once);
  };
  // Tokens past the last are left as they are: each stays in its own column, which is not stored.
  const int tokens = min(TOKENS, p.m - first_token);
  auto fetch_x = [&](int i, bool async) {
    constexpr int PER_ROW = X_ROW / 16;
    const u32 to = ring + i % STAGES * STAGE_BYTES;
    const char* base = p.x + static_cast<u64>(first_token) * p.ldx + (part_k + i * PARTS_K) * X_ROW;
#pragma unroll
    for (int piece = 0; piece < (TOKENS * PER_ROW + GROUP_THREADS - 1) / GROUP_THREADS; ++piece) {
      const int at = piece * GROUP_THREADS + in_group, token = at / PER_ROW, part = at % PER_ROW * 16;
      if (token >= tokens) continue;
      const char* source = base + static_cast<u64>(token) * p.ldx + part;
      const u32 target = to + (WARPGROUP ? part / 128 * TOKENS * 128 + token * 128 + (part % 128 ^ token % 8 * 16)
                                         : token * STRIDE + part);
      if (async) {
        copy_async(target, source, again);
      } else {
        const uint4 v = *reinterpret_cast<const uint4*>(source);
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(v.x), "r"(v.y),
                     "r"(v.z), "r"(v.w));
      }
    }
  };

  // The weight is nobody's output: its first stages are on their way before x exists.
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) {
    if (i < my_steps) fetch_weights(i);
    commit();
  }
  wait_for_previous_kernel();
  Arguments done = p;
  const u32 made = shared_address(memory) + SHARED_BYTES + ROW_CODES;
  if constexpr (MADE) {
    const char* x = p.x + static_cast<u64>(first_token) * p.ldx;
    Row row;
    if constexpr (X_TYPE != 0) {
      u32* beside = reinterpret_cast<u32*>(memory + SHARED_BYTES);
      row = row_of(x, p.k, beside);
      beside += ROW_SCALE / 4;
      if (threadIdx.x == 0) beside[0] = __float_as_uint(row.scale), beside[1] = row.zero;
      done.x_scale = reinterpret_cast<float*>(beside) - first_token;
      done.x_zero = reinterpret_cast<int*>(beside) + 1 - first_token;
    }
    // of the steps that this block takes: WARPS_K of every PARTS_K
    constexpr int EACH = STEP / LOADED;
    const int all = (steps + PARTS_K - 1) / PARTS_K * WARPS_K * EACH;
    for (int item = threadIdx.x; item - lane < all; item += THREADS) {
      const int mine = item / EACH, step = (mine / WARPS_K * SPLITS + blockIdx.z) * WARPS_K + mine % WARPS_K;
      const int k = min(step, steps - 1) * STEP, in_step = item % EACH;
      const u32 to = made + mine * MADE_BYTES;
      if constexpr (FIXED)
        fix(reinterpret_cast<const u16*>(x), k + in_step / 4 * 32, to, item, item < all);
      else if (item < all)
        store_codes(x, k + in_step * LOADED, row, to + in_step * LOADED);
    }
    __syncthreads();
  } else {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (i < my_steps) fetch_x(i, false);
  }

  Sums sums = {};
  for (int i = 0; i < my_steps; ++i) {
    wait_for_oldest();
    if (MADE)
      __syncwarp();  // its weights are its own
    else
      group_barrier(group);  // and everybody is done with the stage that is filled next
    if (i + AHEAD < my_steps) {
      fetch_weights(i + AHEAD);
      if (!MADE) fetch_x(i + AHEAD, true);
    } else if (i + AHEAD == my_steps) {  // a warp with fewer steps says nothing: then it is at the block's end
      let_next_kernel_begin();
    }
    commit();
    const u32 stage = ring + i % STAGES * STAGE_BYTES, weights = stage + X_BYTES + warp_n * W_BYTES + off_line(i);
    const u32 x = MADE ? made + (i * WARPS_K + group) * MADE_BYTES : stage;
    if constexpr (FIXED)
      multiply_fixed(weights, x, lane, p.base, sums);
    else
      multiply(weights, weights, x, lane, p.base, sums);
  }

#if WARPGROUP
  end_products<0>();
  settle(sums);
#endif
#pragma unroll
  for (int r = 0; FIXED && r < ROW_TILES; ++r)
#pragma unroll
    for (int half = 0; half < 4; half += 2) sums[r][0][half] = joined(sums[r][0][half], sums[r][0][half + 1], lane % 4);

  // Partial sums meet in shared memory as [group][token][row].
  constexpr int PITCH = ROWS + 4;
  Sum* parts = reinterpret_cast<Sum*>(memory);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * j + 2 * (lane % 4) + i % 2;
        const int row = (warp_n * ROW_TILES + r) * 16 + lane / 4 + 8 * (i / 2);
        parts[(group * COLUMNS + token) * PITCH + row] = sums[r][j][i];
      }
  cluster_barrier();
  const int outputs = GATED ? p.n / 2 : p.n;
  for (int at = blockIdx.z * THREADS + threadIdx.x; at < tokens * OUTPUTS; at += SPLITS * THREADS) {
    const int token = at / OUTPUTS, n = blockIdx.x * OUTPUTS + at % OUTPUTS, m = first_token + token;
    if (n >= outputs) continue;
    auto total = [&](int row) {
      Sum sum = 0;
#pragma unroll
      for (int part = 0; part < PARTS_K; ++part) {
        Sum* from = &parts[(part % WARPS_K * COLUMNS + token) * PITCH + row];
        sum += SPLITS == 1 ? *from : sum_of(load_remote(shared_address(from), part / WARPS_K));
      }
      return static_cast<float>(sum);
    };
    const float y = result_at(done, total, m, n, at % OUTPUTS);
    const u64 to = static_cast<u64>(m) * outputs + n;
    if (Y_TYPE == 3)
      static_cast<float*>(p.y)[to] = y;
    else
      static_cast<u16*>(p.y)[to] = narrow(y, Y_TYPE);
  }
  if (SPLITS > 1) cluster_barrier();  // its sums may still be read
}
