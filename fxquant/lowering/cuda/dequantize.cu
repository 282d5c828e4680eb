// The weight itself, [rows, k] in the activations' type, for products that are worth a library's
// kernel: channels first_tile * 16 onwards, one warp for each tile and UNIT of k.

struct Unpacked {
  const char* weight;
  const float* w_scale;
  u16* out;
  int n, k, first_tile, tiles;
};

__device__ __forceinline__ float weight_at(const Words<BITS / 2>& w, int half, int kk) {
#if BITS == 8
  const int byte = kk % 4 == 1 ? 2 : kk % 4 == 2 ? 1 : kk % 4;  // (k, k + 1) are (bytes 0 and 2), (1 and 3)
  const u32 code = w.w[2 * half + kk / 4] >> (8 * byte) & 0xff;
#if FLOAT8
  u32 pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<u16>(code)));
  return widen(static_cast<u16>(pair), 2);
#else
  return static_cast<float>(static_cast<int>(code) - 128);
#endif
#elif BITS == 4
  const int nibble = X_BITS == 16 ? kk % 2 * 4 + kk / 2 : kk < 4 ? 2 * kk + 1 : 2 * (kk - 4);
  const int code = w.w[half] >> (4 * nibble) & 0xf;
  return static_cast<float>(X_BITS == 16 ? code - 8 : (code ^ 8) - 8);
#else
  return static_cast<float>(static_cast<int>(w.w[0] >> (2 * (half * 4 + kk / 2 + kk % 2 * 8)) & 3) - 2);
#endif
}

constexpr int PITCH = 32 + 8;  // so that the rows of a block meet different banks

extern "C" __global__ void __launch_bounds__(256) stream_dequantize(const Unpacked p) {
  __shared__ __align__(16) u16 staged[8][16][PITCH];
  const int lane = threadIdx.x % 32, units = p.k / UNIT;
  const int job = blockIdx.x * 8 + threadIdx.x / 32;
  if (job >= p.tiles * units) return;
  const int tile = job / units, unit = job % units;
  const char* from = p.weight + (static_cast<u64>(p.first_tile + tile) * units + unit) * UNIT_BYTES;
  float scale[2], zero[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const u16* qparams = reinterpret_cast<const u16*>(from + UNIT_BYTES - QPARAM_BYTES);
    const float power = X_BITS == 16 ? p.w_scale[min((p.first_tile + tile) * 16 + row, p.n - 1)] : 1.0f;
    scale[half] = power * (GROUPED ? widen(qparams[ZERO ? 2 * row : row], 1) : 1.0f);
    if (ZERO) zero[half] = power * widen(qparams[2 * row + 1], 1);
  }
#pragma unroll
  for (int block = 0; block < UNIT / 32; ++block) {
    Words<BITS / 2> w;
    const u32* words = reinterpret_cast<const u32*>(from + block * BLOCK_BYTES) + lane * (BITS / 2);
#pragma unroll
    for (int i = 0; i < BITS / 2; ++i) w.w[i] = __ldg(words + i);
    u16(*rows)[PITCH] = staged[threadIdx.x / 32];
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 low = narrow(weight_at(w, half, 2 * i) * scale[half] + zero[half], Y_TYPE);
        const u32 high = narrow(weight_at(w, half, 2 * i + 1) * scale[half] + zero[half], Y_TYPE);
        const int first = X_BITS == 16 ? i * 8 + lane % 4 * 2 : i / 2 * 16 + lane % 4 * 4 + i % 2 * 2;
        *reinterpret_cast<u32*>(&rows[lane / 4 + 8 * half][first]) = low | high << 16;
      }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 64 bytes of each row, 16 by a lane
      const int row = lane / 4 + 8 * half, at = tile * 16 + row;
      u16* to = p.out + static_cast<u64>(at) * p.k + unit * UNIT + block * 32 + lane % 4 * 8;
      if (p.first_tile * 16 + at < p.n)
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&rows[row][lane % 4 * 8]);
    }
  }
}
