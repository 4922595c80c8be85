// The PTX instructions that CUDA C++ has no spelling for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace higgs::cuda {

// Weights are read once: 16 bytes straight to registers, not kept in L1. A warp reads whole lines: a prefetch hint
// (.L2::256B) costs up to 2 %. Not .nc: the assembler may sink a read-only
// load past a warp barrier, and the main loop relies on it being issued early.
__device__ __forceinline__ uint4 load_streaming(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// out = valid ? p[kOffset] : 0. One instruction, and not to be moved past wait_for_primary().
template <int kOffset>
__device__ __forceinline__ void load_if(bool valid, const float4* p, float4& out) {
  asm volatile(
      "{\n.reg .pred valid;\nsetp.ne.b32 valid, %4, 0;\nmov.b32 %0, 0f00000000;\nmov.b32 %1, 0f00000000;\n"
      "mov.b32 %2, 0f00000000;\nmov.b32 %3, 0f00000000;\n@valid ld.global.v4.f32 {%0,%1,%2,%3},[%5+%6];\n}"
      : "=f"(out.x), "=f"(out.y), "=f"(out.z), "=f"(out.w)
      : "r"(static_cast<int>(valid)), "l"(p), "n"(kOffset * 16)
      : "memory");
}
template <int kOffset>
__device__ __forceinline__ void load_if(bool valid, const uint2* p, uint2& out) {
  asm volatile(
      "{\n.reg .pred valid;\nsetp.ne.b32 valid, %2, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"
      "@valid ld.global.v2.u32 {%0,%1},[%3+%4];\n}"
      : "=r"(out.x), "=r"(out.y)
      : "r"(static_cast<int>(valid)), "l"(p), "n"(kOffset * 8)
      : "memory");
}

__device__ __forceinline__ uint2 load_streaming(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}

// Brings a line to the L2 cache.
inline constexpr int kLineBytes = 128;
__device__ __forceinline__ void prefetch_line(const uint8_t* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory");
}

// 16 bytes of shared memory, here and not later.
__device__ __forceinline__ uint4 load_shared(const void* p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(p)))
               : "memory");
  return v;
}

// 16 bytes of global memory if `valid`, otherwise anything.
__device__ __forceinline__ uint4 load_global_if(bool valid, const uint4* p) {
  uint4 v;
  asm volatile("{\n.reg .pred valid;\nsetp.ne.b32 valid, %4, 0;\n@valid ld.global.v4.u32 {%0,%1,%2,%3}, [%5];\n}"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(static_cast<int>(valid)), "l"(p)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared(uint32_t at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}

// Programmatic dependent launch: let the next kernel start its prologue / wait for the results of the previous one.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_primary() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Barrier `id` among `threads` threads of the block.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// threadIdx.x and blockIdx.x, read here: what is computed from them is not kept in registers from before.
__device__ __forceinline__ int thread_now() {
  int v;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
  return v;
}
__device__ __forceinline__ int block_now() {
  int v;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(v));
  return v;
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
#endif
  return r;
}
// Execution barrier of the cluster. Relaxed: it orders no memory, and so needs no (slow) fence.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
// The same, and what was written before is seen by those who have waited.
__device__ __forceinline__ void cluster_arrive_release() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// A barrier in shared memory that counts bytes sent by the CTAs of the cluster.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier))
      : "memory");
#endif
}
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}
// Writes to the shared memory of CTA `rank` of the cluster and counts the bytes at its barrier.
__device__ __forceinline__ void send(float4* to, float4 value, uint64_t* barrier, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 to, bar;\n"
      "mapa.shared::cluster.u32 to, %0, %6;\nmapa.shared::cluster.u32 bar, %5, %6;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%1,%2,%3,%4}, [bar];\n}" ::"r"(
          shared_address(to)),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
#endif
}

// Writes to the shared memory of CTA `rank` of the cluster.
__device__ __forceinline__ void store_remote(float4* to, float4 value, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 to;\nmapa.shared::cluster.u32 to, %0, %5;\n"
      "st.shared::cluster.v4.f32 [to], {%1,%2,%3,%4};\n}" ::"r"(shared_address(to)),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(rank)
      : "memory");
#endif
}

// d += a b: a 16 x 16 row-major, b 16 x 8 column-major, d 16 x 8 fp32.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint2 b);
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint2 b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint2 b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

}  // namespace higgs::cuda
