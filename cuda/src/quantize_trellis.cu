// quantize for additive trellis grids: float weights -> stored layout; FORMAT.md, "From weights to bytes", bit for bit.
// One block per row: rotation and scales as in quantize.cu, then the best path of every run of the row by a Viterbi
// search. Costs are integers that neither fp32 nor int32 rounds (runs have at most 64 weights), so the order of
// evaluation does not matter.
//
//   step t     of a run with N steps: two weights with value lo[piece t] + hi[piece t + shift], pieces cyclic
//   cost       sum over both of 4 V^2 - V X; V: the value, X: the normalized weight times 256, rounded
//   state      before step t: pieces t .. t + shift - 1, (shift - 1) bits + 8 bits
//   pass 1     3 N / 2 steps from step N/4 on, around the run, from any state to the best one: gives the state before
//              step 0
//   pass 2     steps 0 .. N - 1 from this state and back to it
//
// A two-way dot product and a minimum per edge are left when the terms that depend on one of the two pieces only are
// taken out:
//   cost(lo, hi) = [4 lo^2 - lo X] + [4 hi^2 - hi X] + 8 lo hi
#include <algorithm>

#include "checks.h"
#include "higgs/cuda/ops.h"
#include "launch.h"
#include "quantize_row.cuh"
#include "quantize_trellis.h"
#include "trellis_run.cuh"
#include "trellis_table.h"

namespace higgs::cuda {
namespace {

constexpr int kPieces = 256;
constexpr int kMaxSteps = kRunGroup / 8;  // of a run
constexpr float kLargest = 1444.0f;       // |X|: path costs stay below 2^24

__device__ __forceinline__ int own_cost(char2 v, int2 x) { return 4 * (v.x * v.x + v.y * v.y) - v.x * x.x - v.y * x.y; }

struct RunInput {
  int steps;
  const int2* x;  // X of the two weights of each step

  // Pass 1; pass 2 has `steps` steps from step 0 on.
  __device__ __forceinline__ int first_of_bite() const { return steps / 4; }
  __device__ __forceinline__ int steps_of_bite() const { return steps / 2 * 3; }
  __device__ __forceinline__ int cyclic(int step) const { return step < steps ? step : step - steps; }
};

// `factor` times both of v, as 16-bit integers.
__device__ __forceinline__ int scaled_pair(int factor, char2 v) {
  return static_cast<int>(static_cast<uint32_t>(factor * v.x) & 0xffff | static_cast<uint32_t>(factor * v.y) << 16);
}
__device__ __forceinline__ int byte_pair(char2 v) { return (v.x & 0xff) | (v.y & 0xff) << 8; }

// Pieces and the two tables in shared memory.
struct Tables {
  char2 lo[kPieces];
  char2 hi[kPieces];
};

// The lowest index among those with the least value in a warp.
struct Least {
  int value = 0x7fffffff;
  int index = 0x7fffffff;

  __device__ __forceinline__ void take(int v, int i) {  // indices in ascending order
    if (v < value) {
      value = v;
      index = i;
    }
  }
  __device__ __forceinline__ int of_warp() const {
    const int least = __reduce_min_sync(~0u, value);
    return __reduce_min_sync(~0u, value == least ? index : 0x7fffffff);
  }
};

constexpr int kNever = 1 << 25;  // more than any cost of a path

// --- shift 1: 256 states. Path costs of the steps are kept, and the way back is found by comparing again. ------------
template <int Bits>
struct SearchOne {
  static constexpr int kThreads = Bits < 7 ? 128 : 64;
  static constexpr int kOwn = kPieces / kThreads;                   // pieces of a thread
  static constexpr int kFree = 1 << Bits;                           // pieces that may precede one
  static constexpr int kTogether = std::min(kOwn, kFree / kLanes);  // a thread's with the same predecessors

  alignas(16) int entry[2][kPieces];  // least cost of a path to each state, plus the cost of lo of the step
  alignas(16) int slope[kPieces];     // 8 lo
  int cost[kMaxSteps + 1][kPieces];   // without the cost of lo; from step `kept` of a sweep on
  int start;
  uint8_t piece[kMaxSteps];

  __device__ __forceinline__ void set_up(const Tables& t) {
    for (int i = threadIdx.x; i < kPieces; i += kThreads) slope[i] = scaled_pair(8, t.lo[i]);
  }
  // The threads of a warp have pieces with the same predecessors, first_before(c) ..
  static __device__ __forceinline__ int own_piece(int i) {
    const int j = (threadIdx.x / kLanes * kOwn + i) * kLanes + threadIdx.x % kLanes;
    return (j % kFree) << (8 - Bits) | j / kFree;
  }
  static __device__ __forceinline__ int first_before(int c) { return (c & ((1 << (8 - Bits)) - 1)) << Bits; }

  // `steps` steps from step `from` on, around the run; from_state: the state, or -1 for any.
  __device__ void sweep(const Tables& t, const RunInput& run, int from, int steps, int kept, int from_state) {
    char2 hi[kOwn];
    char2 lo[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int c = own_piece(i);
      hi[i] = t.hi[c];
      lo[i] = t.lo[c];
      const int total = from_state < 0 || c == from_state ? 0 : kNever;
      if (kept == 0) cost[0][c] = total;
      entry[0][c] = total + own_cost(lo[i], run.x[from]);
    }
    __syncthreads();
    int at = from;
    for (int s = 1; s <= steps; ++s) {
      const int next = run.cyclic(at + 1);
      int least[kOwn];
      search(entry[(s - 1) % 2], hi, least);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int c = own_piece(i);
        const int total = least[i] + own_cost(hi[i], run.x[at]);
        if (s >= kept) cost[s - kept][c] = total;
        entry[s % 2][c] = total + own_cost(lo[i], run.x[next]);
      }
      at = next;
      __syncthreads();
    }
  }
  __device__ __forceinline__ void search(const int* from, const char2 (&hi)[kOwn], int (&least)[kOwn]) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) least[i] = 0x7fffffff;
#pragma unroll
    for (int first = 0; first < kOwn; first += kTogether) {
      const int before = first_before(own_piece(first));
#pragma unroll 8
      for (int f = 0; f < kFree; f += 4) {
        const int4 e = *reinterpret_cast<const int4*>(from + before + f);
        const int4 a = *reinterpret_cast<const int4*>(slope + before + f);
#pragma unroll
        for (int i = first; i < first + kTogether; ++i) {
          const int h = byte_pair(hi[i]);
          least[i] = __vimin3_s32(least[i], __dp2a_lo(a.x, h, e.x), __dp2a_lo(a.y, h, e.y));
          least[i] = __vimin3_s32(least[i], __dp2a_lo(a.z, h, e.z), __dp2a_lo(a.w, h, e.w));
        }
      }
    }
  }
  // First warp: the lowest of the best states, `row` of cost.
  __device__ __forceinline__ int best_state(int row) const {
    Least best;
    for (int c = threadIdx.x; c < kPieces; c += 32) best.take(cost[row][c], c);
    return best.of_warp();
  }
  // First warp: the best path into `state` after `steps` steps, back to step `kept`; pieces at `piece[step]`.
  __device__ int trace(const Tables& t, const RunInput& run, int from, int steps, int kept, int state) {
    for (int s = steps - 1; s >= kept; --s) {
      const int at = run.cyclic(run.cyclic(from + s));
      const int before = first_before(state);
      const char2 h = t.hi[state];
      Least best;
      for (int f = threadIdx.x; f < kFree; f += 32) {
        const char2 l = t.lo[before + f];
        best.take(cost[s - kept][before + f] + own_cost(l, run.x[at]) + 8 * (l.x * h.x + l.y * h.y), before + f);
      }
      state = best.of_warp();
      if (threadIdx.x == 0) piece[at] = static_cast<uint8_t>(state);
    }
    return state;
  }
  // All threads; then piece_of() is valid.
  __device__ void encode(const Tables& t, const RunInput& run) {
    const int first = run.first_of_bite();
    const int steps = run.steps_of_bite();
    const int kept = run.steps - first;  // where the bite is
    sweep(t, run, first, steps, kept, -1);
    if (threadIdx.x < 32) {
      const int bite = trace(t, run, first, steps, kept, best_state(steps - kept));
      if (threadIdx.x == 0) start = bite;
    }
    __syncthreads();
    const int state = start;
    sweep(t, run, 0, run.steps, 0, state);
    if (threadIdx.x < 32) trace(t, run, 0, run.steps, 0, state);
    __syncthreads();
  }
  __device__ __forceinline__ uint32_t piece_of(int step, int /*steps*/) const { return piece[step]; }
};

// --- 4 bits, shift 2: 4096 states of three nibbles n0 n1 n2; a step forgets n0 and adds n3 ---------------------------
// The nibble that was forgotten is kept in the lowest bits of a cost, so that the least cost also names it. A thread
// has n1, n2 and half of the n3: a cost that it loads meets eight pieces, and its lo stay in registers. Otherwise
// shared memory, not arithmetic, would limit the search.
struct SearchTwo {
  static constexpr int kParts = 2;  // of the n3: n3 % kParts
  static constexpr int kThreads = kParts * kPieces;
  static constexpr int kOwn = 16 / kParts;
  // Costs with the same n1 and n2, and with the same n2: 20 and 16 banks ahead, for loads of 16 bytes and stores of 4.
  static constexpr int kLine = 20;
  static constexpr int kRow = 16 * kLine + 16;

  alignas(16) int entry[2][16 * kRow];  // [n2][n1][n0]: 16 (least cost of a path to the state + of lo of the step) + n0
  alignas(16) int slope[kPieces];       // 128 lo of piece n0 | n1 << 4, by n0 + 16 n1
  uint32_t back[kMaxSteps][kThreads];   // nibble n3 / kParts of a thread: n0 of the best path to state n1 n2 n3
  int start;
  uint8_t nibble[kMaxSteps];  // n0 of the state before each step

  __device__ __forceinline__ void set_up(const Tables& t) {
    if (threadIdx.x < kPieces) slope[threadIdx.x] = scaled_pair(128, t.lo[threadIdx.x]);
  }
  static __device__ __forceinline__ int place(unsigned state) {
    return state / kPieces * kRow + state % kPieces / 16 * kLine + state % 16;
  }

  // As in SearchOne.
  __device__ void sweep(const Tables& t, const RunInput& run, int from, int steps, int kept, int from_state) {
    const int part = threadIdx.x % kParts;
    const int n1 = threadIdx.x / kParts % 16;
    const int n2 = threadIdx.x / kParts / 16;
    for (int i = 0; i < kOwn; ++i) {
      const int state = threadIdx.x + i * kThreads;
      const int cost = from_state < 0 || from_state == state ? 0 : kNever;
      entry[0][place(state)] =
          16 * (cost + own_cost(t.lo[threadIdx.x % kPieces], run.x[from])) + static_cast<int>(threadIdx.x % 16);
    }
    int4 a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = reinterpret_cast<const int4*>(slope + n1 * 16)[i];
    const char2 lo = t.lo[n1 | n2 << 4];  // of the step after
    char2 hi[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) hi[i] = t.hi[n2 | (part + kParts * i) << 4];
    __syncthreads();
    int at = from;
    for (int s = 0; s < steps; ++s) {
      const int next = run.cyclic(at + 1);
      int least[kOwn];
      search(entry[s % 2] + n2 * kRow + n1 * kLine, a, hi, least);
      int* to = entry[(s + 1) % 2] + part * kRow + n2 * kLine + n1;
      const int2 x = run.x[at];
      const int of_lo = s + 1 < steps ? own_cost(lo, run.x[next]) : 0;
      uint32_t nibbles = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        nibbles |= static_cast<uint32_t>(least[i] & 15) << (4 * i);
        to[kParts * i * kRow] = 16 * ((least[i] >> 4) + own_cost(hi[i], x) + of_lo) + n1;
      }
      if (s >= kept) back[s - kept][threadIdx.x] = nibbles;
      at = next;
      __syncthreads();
    }
  }
  static __device__ __forceinline__ void search(const int* from, const int4 (&a)[4], const char2 (&hi)[kOwn],
                                                int (&least)[kOwn]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) least[i] = 0x7fffffff;
#pragma unroll
    for (int n0 = 0; n0 < 16; n0 += 4) {
      const int4 e = *reinterpret_cast<const int4*>(from + n0);
      const int4 v = a[n0 / 4];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int h = byte_pair(hi[i]);
        least[i] = __vimin3_s32(least[i], __dp2a_lo(v.x, h, e.x), __dp2a_lo(v.y, h, e.y));
        least[i] = __vimin3_s32(least[i], __dp2a_lo(v.z, h, e.z), __dp2a_lo(v.w, h, e.w));
      }
    }
  }
  // First warp: the lowest of the best states after `steps` steps.
  __device__ __forceinline__ int best_state(int steps) const {
    Least best;
#pragma unroll 8
    for (int i = threadIdx.x; i < 16 * kPieces; i += 32) best.take(entry[steps % 2][place(i)] >> 4, i);
    return best.of_warp();
  }
  // One thread: the best path into `state`, back to step `kept`.
  __device__ int trace(const RunInput& run, int from, int steps, int kept, int state) {
    for (int s = steps - 1; s >= kept; --s) {
      const int n3 = state / kPieces;
      const uint32_t nibbles = back[s - kept][state % kPieces * kParts + n3 % kParts];
      state = (state << 4 & 0xfff) | (nibbles >> (n3 / kParts * 4) & 15);
      nibble[run.cyclic(run.cyclic(from + s))] = static_cast<uint8_t>(state & 15);
    }
    return state;
  }
  __device__ void encode(const Tables& t, const RunInput& run) {
    const int first = run.first_of_bite();
    const int steps = run.steps_of_bite();
    const int kept = run.steps - first;
    sweep(t, run, first, steps, kept, -1);
    if (threadIdx.x < 32) {
      const int best = best_state(steps);
      if (threadIdx.x == 0) start = trace(run, first, steps, kept, best);
    }
    __syncthreads();
    const int state = start;
    sweep(t, run, 0, run.steps, 0, state);
    if (threadIdx.x == 0) trace(run, 0, run.steps, 0, state);
    __syncthreads();
  }
  __device__ __forceinline__ uint32_t piece_of(int step, int steps) const {
    return nibble[step] | nibble[step + 1 < steps ? step + 1 : 0] << 4;
  }
};

template <int Bits>
using SearchOf = std::conditional_t<trellis_shift(Bits) == 1, SearchOne<Bits>, SearchTwo>;

template <int Bits>
struct Shared {
  Tables tables;
  int2 x[kMaxSteps];
  union {
    SearchOf<Bits> search;
    float scratch[SearchOf<Bits>::kThreads / 32 * kChunkScratch];  // rotation comes before the search
  };
};

__device__ __forceinline__ int rounded(float v) { return __float2int_rn(fminf(fmaxf(256 * v, -kLargest), kLargest)); }

// Run t of group g of a row.
template <int Bits>
__device__ void encode_run(const QuantizeLayer& layer, const GroupState* groups, const float* row, int g, int t,
                           uint8_t* row_bytes, Shared<Bits>& shared) {
  const StoredRun run(row_bytes, layer.k, g, t, Bits);
  const int i = static_cast<int>(threadIdx.x);
  if (i < run.steps) {
    const int column = g * kRunGroup + i / 2 * 16 + 4 * t + i % 2 * 2;
    const float inverse = groups[column / layer.group].inverse;
    shared.x[i] = make_int2(rounded(__fmul_rn(row[column], inverse)), rounded(__fmul_rn(row[column + 1], inverse)));
  }
  __syncthreads();
  shared.search.encode(shared.tables, {run.steps, shared.x});
  if (i < run.count) {  // byte i: the steps' pieces overlap, the lowest bits of each are its own
    uint32_t byte = 0;
    for (int b = 0; b < 8; ++b) {
      const int step = (8 * i + b) / Bits;
      byte |= (shared.search.piece_of(step, run.steps) >> ((8 * i + b) % Bits) & 1u) << b;
    }
    const_cast<uint8_t*>(run.bytes)[i] = static_cast<uint8_t>(byte);
  }
  __syncthreads();
}

template <typename T, int Bits>
__global__ void __launch_bounds__(SearchOf<Bits>::kThreads)
    quantize_trellis_kernel(const __grid_constant__ TrellisTable table,
                            const __grid_constant__ BlockTransform transform, const QuantizeLayer layer, const T* w) {
  extern __shared__ __align__(32) uint8_t dynamic[];
  auto& shared = *reinterpret_cast<Shared<Bits>*>(dynamic);
  auto* groups = reinterpret_cast<GroupState*>(dynamic + sizeof(Shared<Bits>));
  auto* row = reinterpret_cast<float*>(groups + layer.row_groups);
  const int64_t n_row = blockIdx.x;
  uint8_t* bytes = layer.indices + n_row * layer.row_bytes;
  for (int i = threadIdx.x; i < kPieces; i += blockDim.x) {
    const uint32_t e = table.entries[i];
    shared.tables.hi[i] = make_char2(static_cast<char>(e & 0xff), static_cast<char>(e >> 8 & 0xff));
    shared.tables.lo[i] = make_char2(static_cast<char>(e >> 16 & 0xff), static_cast<char>(e >> 24));
  }
  rotate_row(layer, transform, w + n_row * layer.k, row, shared.scratch);
  __syncthreads();
  first_scales(layer, row, groups);
  shared.search.set_up(shared.tables);
  __syncthreads();
  for (int run = 0; run < (layer.k + kRunGroup - 1) / kRunGroup * 4; ++run) {
    encode_run<Bits>(layer, groups, row, run / 4, run % 4, bytes, shared);
  }
  refit_scales(layer, row, groups, layer.scales + n_row * layer.row_groups, [&](int column) -> double {
    const int in_group = column % kRunGroup;
    const StoredRun run(bytes, layer.k, column / kRunGroup, in_group / 4 % 4, Bits);
    const int step = in_group / 16 * 2 + in_group % 4 / 2;
    const char2 lo = shared.tables.lo[run.window(step * Bits)];
    const char2 hi = shared.tables.hi[run.window((step + trellis_shift(Bits)) * Bits)];
    return static_cast<double>(in_group % 2 == 0 ? lo.x + hi.x : lo.y + hi.y) * kTrellisStep;
  });
  store_row_stats(layer, groups, n_row);
}

template <typename T, int Bits>
void launch(const TrellisTable& table, int block, const QuantizeLayer& layer, std::int64_t n, const void* w,
            Stream stream) {
  const int shared =
      static_cast<int>(sizeof(Shared<Bits>)) + layer.row_groups * static_cast<int>(sizeof(GroupState)) + layer.k * 4;
  const int limit = current_device().shared_bytes_per_block;
  if (shared > limit) {
    throw Error(ErrorCode::unsupported, "quantize: a row of k = " + std::to_string(layer.k) + " needs " +
                                            std::to_string(shared) + " bytes of shared memory; this device has " +
                                            std::to_string(limit));
  }
  allow_shared<quantize_trellis_kernel<T, Bits>>(limit);
  quantize_trellis_kernel<T, Bits>
      <<<static_cast<unsigned>(n), SearchOf<Bits>::kThreads, static_cast<std::size_t>(shared), to_stream(stream)>>>(
          table, block_transform(block), layer, static_cast<const T*>(w));
}

}  // namespace

void quantize_trellis(const Grid& grid, int block, const QuantizeLayer& layer, std::int64_t n, const void* w,
                      DType w_dtype, Stream stream) {
  const TrellisTable table = make_trellis_table(grid);
  dispatch(w_dtype, [&]<typename T>() {
    switch (table.bits) {
      case 4: return launch<T, 4>(table, block, layer, n, w, stream);
      case 5: return launch<T, 5>(table, block, layer, n, w, stream);
      case 6: return launch<T, 6>(table, block, layer, n, w, stream);
      case 7: return launch<T, 7>(table, block, layer, n, w, stream);
      default: return launch<T, 8>(table, block, layer, n, w, stream);
    }
  });
}

}  // namespace higgs::cuda
