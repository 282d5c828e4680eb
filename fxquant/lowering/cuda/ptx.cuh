// What CUDA C++ has no word for: asynchronous copies, barriers, matrices and their products.

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void copy_async(u32 to, const char* from, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "l"(policy)
               : "memory");
}

__device__ __forceinline__ u64 keep_policy(bool keep) {
  u64 policy;
  if (keep)
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ void wait_for_oldest() {
  asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1) : "memory");
  if (WARPGROUP) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The previous kernel of the stream may still run until here; nothing it writes is read before.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may begin, and fetch weights until it waits for this one's end: once all warps are here or have ended,
// by what was read. Only what has issued its own loads is here: a small kernel that begins any sooner gets what places
// are left, several blocks of it on a few multiprocessors.
__device__ __forceinline__ void let_next_kernel_begin() {
  if (EARLY) asm volatile("griddepcontrol.launch_dependents;");
}

__device__ __forceinline__ void group_barrier(int group) {
  if (WARPS_N == 1)
    __syncwarp();
  else
    asm volatile("bar.sync %0, %1;" ::"r"(WARPS_K == 1 ? 1 : group + 1), "n"(GROUP_THREADS) : "memory");
}

template <int WORDS>
struct Words {
  u32 w[WORDS];
};

template <int WORDS>
__device__ __forceinline__ Words<WORDS> load_shared(u32 at) {
  Words<WORDS> v;
  if constexpr (WORDS == 4)
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "r"(at));
  else if constexpr (WORDS == 2)
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "r"(at));
  else
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v.w[0]) : "r"(at));
  return v;
}

template <int WORDS>
__device__ __forceinline__ Words<WORDS> load_matrices(u32 at) {
  Words<WORDS> v;
  if constexpr (WORDS == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "r"(at));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "r"(at));
  return v;
}

__device__ __forceinline__ float widen(u16 bits, int type) {  // 1 bfloat16, 2 float16
  float f;
  if (type == 2)
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  else
    f = __uint_as_float(static_cast<u32>(bits) << 16);
  return f;
}

__device__ __forceinline__ u16 narrow(float f, int type) {
  u16 bits;
  if (type == 2)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}

// a * b + c on pairs of the activations' 16-bit type, rounded once
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  if (X_HALF)
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ void product16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if (X_HALF)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void product8(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void product8(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
