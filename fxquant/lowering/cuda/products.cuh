// Sums of products, and what wgmma asks for beside its operands.

template <bool YES, class A, class B>
struct If {
  typedef A type;
};
template <class A, class B>
struct If<false, A, B> {
  typedef B type;
};
typedef If<INTEGER && !GROUPED, int, float>::type Sum;
typedef Sum Sums[ROW_TILES][TOKEN_TILES][4];

__device__ __forceinline__ u32 bits_of(int sum) { return sum; }
__device__ __forceinline__ u32 bits_of(float sum) { return __float_as_uint(sum); }

__device__ __forceinline__ Sum sum_of(u32 bits) {
  if constexpr (INTEGER && !GROUPED)
    return static_cast<int>(bits);
  else
    return __uint_as_float(bits);
}

#if WARPGROUP

// Sums that are moved on (integers in groups, float8) while the next ones are in the making, where registers
// allow it
constexpr int PARTS = TOKENS <= 64 ? 2 : 1;

// Rows of 128 bytes in groups of eight, 1024 bytes apart; the 16-byte columns of a row are swapped by
// its number modulo 8 (the "128-byte swizzle").
__device__ __forceinline__ u64 descriptor(u32 x) {
  return (x & 0x3ffff) >> 4 | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

// 32 bytes of k number ``index``, for every token: added to a descriptor
__device__ __forceinline__ constexpr u64 slice(int index) {
  return (index / 4 * TOKENS * 128 + index % 4 * 32) >> 4;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The compiler takes sums for ready as soon as their product is issued, and may move what reads them up to
// there: after a wait they are as if written anew.
__device__ __forceinline__ void settle(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }
__device__ __forceinline__ void settle(int& sum) { asm volatile("" : "+r"(sum)::"memory"); }
template <class Part, int COUNT>
__device__ __forceinline__ void settle(Part (&sums)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) settle(sums[i]);
}

template <int PENDING>
__device__ __forceinline__ void end_products() {
  commit_products();
  wait_for_products<PENDING>();
}

// Groups of products whose sums are moved on: ``begin(i, part)`` issues group ``i``, ``move(i, part)`` takes its
// sums, while the group after it runs.
template <int GROUPS_IN_ALL, class Part, class Begin, class Move>
__device__ __forceinline__ void in_turns(Begin begin, Move move) {
  Part part[PARTS][TOKEN_TILES][4];
#pragma unroll
  for (int i = 0; i < GROUPS_IN_ALL + PARTS - 1; ++i) {
    if (i < GROUPS_IN_ALL) {
      begin(i, part[i % PARTS]);
      commit_products();
    }
    const int done = i - (PARTS - 1);
    if (done < 0) continue;
    if (i < GROUPS_IN_ALL)
      wait_for_products<PARTS - 1>();
    else
      wait_for_products<0>();
    settle(part[done % PARTS]);
    move(done, part[done % PARTS]);
  }
}

#endif
