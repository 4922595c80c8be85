// Asynchronous copies to shared memory, and matrices of 8 x 8 values: what sm_80 has for a GEMM.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace higgs::cuda {

// 16 bytes from global to shared memory.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` of the groups this thread has committed are still on their way.
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit values: row i of matrix j (16 bytes) is at the address of lane 8 j + i; lane 4 g + t
// gets columns 2 t, 2 t + 1 of row g of each.
__device__ __forceinline__ void load_matrices(uint32_t from, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from)
               : "memory");
}
// The transpose of such a matrix.
__device__ __forceinline__ uint32_t transposed(uint32_t v) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
  return out;
}

}  // namespace higgs::cuda
