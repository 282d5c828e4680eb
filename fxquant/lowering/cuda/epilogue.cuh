// From sums to the result, and what blocks of a cluster need to add theirs up.

__device__ __forceinline__ float activate(float y) {
  if (ACTIVATION == 1) return y < 0 ? 0.0f : y;
  if (ACTIVATION == 2) return 0.5f * y * (1.0f + erff(y * 0.7071067811865476f));
  if (ACTIVATION == 3) return y / (1.0f + expf(-1.5957691216057308f * (y + 0.044715f * y * y * y)));
  if (ACTIVATION == 4) return y / (1.0f + expf(-y));
  return y;
}

__device__ __forceinline__ float bias_at(const void* bias, int n) {
  if (BIAS_TYPE == 0) return 0.0f;
  return BIAS_TYPE == 3 ? static_cast<const float*>(bias)[n] : widen(static_cast<const u16*>(bias)[n], BIAS_TYPE);
}

constexpr bool SCALED = !GROUPED || (X_BITS == 16 && !WIDENED);  // by one scale a channel, after the sum

__device__ __forceinline__ float scaled(float y, float x_scale, float x_zero, float w_scale, float w_sum, float bias) {
  if (X_ZERO) y -= x_zero * w_sum;
  if (X_SCALED) y *= x_scale;
  if (SCALED) y *= w_scale;
  return y + bias;
}

template <class Arguments>
__device__ __forceinline__ float scaled_at(const Arguments& p, float y, int m, int n) {
  return scaled(y, X_SCALED ? p.x_scale[m] : 1.0f, X_ZERO ? p.x_zero[m] : 0.0f,
                SCALED ? p.w_scale[n] * SUM_FACTOR : 1.0f, X_ZERO ? p.w_sum[n] : 0.0f, bias_at(p.bias, n));
}

// A block's channel of y, in a block's channels of the weight: its own, or that of the first half; the
// second half's is a tile further.
__device__ __forceinline__ constexpr int row_of(int output) {
  return GATED ? output / 16 * 32 + output % 16 : output;
}

// y at token m and channel n. total(row): the sum for a block's channel of the weight.
template <class Arguments, class Total>
__device__ __forceinline__ float result_at(const Arguments& p, const Total& total, int m, int n, int output) {
  const float y = activate(scaled_at(p, total(row_of(output)), m, n));
  return GATED ? y * scaled_at(p, total(row_of(output) + 16), m, n + p.n / 2) : y;
}

// Where in the cluster's memory another block has what this one has at the same place
__device__ __forceinline__ u32 remote_address(u32 at, int block) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
  return there;
}

__device__ __forceinline__ u32 load_remote(u32 at, int block) {
  u32 value;
  asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(value) : "r"(remote_address(at, block)) : "memory");
  return value;
}

__device__ __forceinline__ void cluster_barrier() {
  if (SPLITS == 1)
    __syncthreads();
  else
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
