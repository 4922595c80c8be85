// Warpgroup MMA of sm_90a with A from registers, and the asynchronous copies that feed its B operand.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

namespace higgs::cuda {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `Pending` of the committed groups are still running.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Until all have ended: their sums are neither read nor moved before.
template <typename T, int Registers>
__device__ __forceinline__ void wgmma_wait_all(T (&sums)[Registers]) {
  wgmma_wait<0>();
#pragma unroll
  for (T& sum : sums) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(sum)::"memory");
    } else {
      asm volatile("" : "+r"(sum)::"memory");
    }
  }
}

// Descriptor of a B tile in shared memory: rows of 64 16-bit values (128 bytes), K-major, 128-byte swizzle, 8 rows
// every 1024 bytes. Advancing by 16 values along k adds 32 bytes to the start address.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t kEightRows = 1024 / 16;
  constexpr uint64_t kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | kEightRows << 32 | kSwizzle128 << 62;
}
inline constexpr uint64_t kDescriptorStep = 32 / 16;

// d += a b, or d = a b: a 64 x 16 of the warpgroup in registers (each warp 16 rows, as in mma.m16n8k16), b 16 x N in
// shared memory, d 64 x N fp32. N = 2 * (registers of d).
#define HIGGS_D8(i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define HIGGS_D32(i) HIGGS_D8(i), HIGGS_D8(i + 8), HIGGS_D8(i + 16), HIGGS_D8(i + 24)
#define HIGGS_P8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define HIGGS_P16 HIGGS_P8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define HIGGS_P32 HIGGS_P16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define HIGGS_P64                                                                                             \
  HIGGS_P32                                                                                                   \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
  "%58,%59,%60,%61,%62,%63"
#define HIGGS_P128                                                                                            \
  HIGGS_P64                                                                                                   \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89," \
  "%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"      \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define HIGGS_WGMMA(n, type, list, a0, a1, a2, a3, b, add, ...)                                                   \
  asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %" add ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type \
               "." type " {" list "}, {%" a0 ",%" a1 ",%" a2 ",%" a3 "}, %" b ", p, 1, 1, 0;\n}"                  \
               : __VA_ARGS__                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_tile), "r"(add_to_d))
#define HIGGS_WGMMA_N(regs, n, list, a0, a1, a2, a3, b, add, ...)                                                 \
  template <>                                                                                                     \
  __device__ __forceinline__ void wgmma<__half>(float (&d)[regs], const uint32_t (&a)[4], uint64_t b_tile,        \
                                                int add_to_d) {                                                   \
    HIGGS_WGMMA(n, "f16", list, a0, a1, a2, a3, b, add, __VA_ARGS__);                                             \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ __forceinline__ void wgmma<__nv_bfloat16>(float (&d)[regs], const uint32_t (&a)[4], uint64_t b_tile, \
                                                       int add_to_d) {                                            \
    HIGGS_WGMMA(n, "bf16", list, a0, a1, a2, a3, b, add, __VA_ARGS__);                                            \
  }
template <typename T, int Regs>
__device__ __forceinline__ void wgmma(float (&d)[Regs], const uint32_t (&a)[4], uint64_t b_tile, int add_to_d);
HIGGS_WGMMA_N(8, "16", HIGGS_P8, "8", "9", "10", "11", "12", "13", HIGGS_D8(0))
HIGGS_WGMMA_N(16, "32", HIGGS_P16, "16", "17", "18", "19", "20", "21", HIGGS_D8(0), HIGGS_D8(8))
HIGGS_WGMMA_N(32, "64", HIGGS_P32, "32", "33", "34", "35", "36", "37", HIGGS_D32(0))
HIGGS_WGMMA_N(64, "128", HIGGS_P64, "64", "65", "66", "67", "68", "69", HIGGS_D32(0), HIGGS_D32(32))
HIGGS_WGMMA_N(128, "256", HIGGS_P128, "128", "129", "130", "131", "132", "133", HIGGS_D32(0), HIGGS_D32(32),
              HIGGS_D32(64), HIGGS_D32(96))

// The same for bytes, those of a signed or not: a 64 x 32, b 32 x N, d 64 x N in integers.
#define HIGGS_I8(i)                                                                                           \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), \
      "+r"(d[i + 7])
#define HIGGS_WGMMA_BYTES(n, type, list, a0, a1, a2, a3, b, ...)                                           \
  asm volatile("{.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" n "k32.s32." type \
               ".s8 {" list "}, {%" a0 ",%" a1 ",%" a2 ",%" a3 "}, %" b ", p;\n}"                          \
               : __VA_ARGS__                                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_tile))
#define HIGGS_WGMMA_BYTES_N(regs, n, list, a0, a1, a2, a3, b, ...)                                       \
  template <bool Unsigned>                                                                               \
  __device__ __forceinline__ void wgmma_bytes(int (&d)[regs], const uint32_t (&a)[4], uint64_t b_tile) { \
    if constexpr (Unsigned) {                                                                            \
      HIGGS_WGMMA_BYTES(n, "u8", list, a0, a1, a2, a3, b, __VA_ARGS__);                                  \
    } else {                                                                                             \
      HIGGS_WGMMA_BYTES(n, "s8", list, a0, a1, a2, a3, b, __VA_ARGS__);                                  \
    }                                                                                                    \
  }
HIGGS_WGMMA_BYTES_N(16, "32", HIGGS_P16, "16", "17", "18", "19", "20", HIGGS_I8(0), HIGGS_I8(8))
HIGGS_WGMMA_BYTES_N(32, "64", HIGGS_P32, "32", "33", "34", "35", "36", HIGGS_I8(0), HIGGS_I8(8), HIGGS_I8(16),
                    HIGGS_I8(24))

// --- barriers in shared memory (mbarrier_expect: ptx.cuh), and bulk copies that count their bytes at one

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives at the barrier of CTA `rank` of the cluster, `Count` times.
template <int ClusterSize, int Count = 1>
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier, int rank) {
  if constexpr (ClusterSize == 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "n"(Count) : "memory");
  } else {
    asm volatile(
        "{\n.reg .b32 to;\nmapa.shared::cluster.u32 to, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [to], "
        "%2;\n}" ::"r"(shared_address(barrier)),
        "r"(rank), "n"(Count)
        : "memory");
  }
}
// Scope of the CTA: that of mbarrier_wait, the cluster, would wait for all loads of the thread.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// `bytes` (a multiple of 16) from global to the shared memory of all CTAs of the cluster, at the same address of each;
// they count at the barrier of each.
template <int ClusterSize>
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  if constexpr (ClusterSize == 1) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
  } else {
    constexpr uint16_t kAll = (1 << ClusterSize) - 1;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(kAll)
        : "memory");
  }
}

// The same to this CTA's shared memory, of what is read once.
__device__ __forceinline__ void copy_bulk_once(uint32_t to, const void* from, int bytes, uint64_t* barrier) {
  constexpr uint64_t kEvictFirst = 0x12f0000000000000;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(kEvictFirst)
      : "memory");
}
// From an address in shared memory.
__device__ __forceinline__ void load_shared(uint32_t from, uint4& v) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
}

// A box of shared memory to its place in a tensor: what is inside of it. To be followed by copies_commit().
__device__ __forceinline__ void copy_box(const void* map, uint32_t from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(column), "r"(row)
               : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until what this thread's copies take from shared memory has been read.
__device__ __forceinline__ void copies_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// What this thread has written to shared memory is there for copies that begin later.
__device__ __forceinline__ void copies_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Copies that begin later read global memory as this thread sees it.
__device__ __forceinline__ void copies_fence_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Four 8 x 8 matrices of 16-bit values in accumulator order, stored transposed: row i of matrix j at the address of
// lane 8 j + i.
__device__ __forceinline__ void store_transposed(uint32_t to, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

}  // namespace higgs::cuda
