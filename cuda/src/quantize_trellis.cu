// quantize for additive trellis grids: float weights -> stored layout; FORMAT.md, "From weights to bytes", bit for bit.
// One block per row: rotation and scales as in quantize.cu, then the best path of every run of the row by a Viterbi
// search. Costs are integers that neither fp32 nor int32 rounds (runs have at most 64 weights), so the order of
// evaluation does not matter.
//
//   step t     of a run with N steps: two weights with value lo[piece t] + hi[piece t + shift], pieces cyclic
//   cost       sum over both of 4 V^2 - V X; V: the value, X: the normalized weight times 256, rounded
//   state      before step t: pieces t .. t + shift - 1, (shift - 1) bits + 8 bits
//   pass 1     steps N/2 .. N - 1, 0 .. N/2 - 1 from any state to the best one: gives the state before step 0
//   pass 2     steps 0 .. N - 1 from this state and back to it
//
// One add and compare per edge is left when the terms that depend on one of the two pieces only are taken out:
//   cost(lo, hi) = [4 lo^2 - lo X] + [4 hi^2 - hi X] + 8 lo hi
#include "checks.h"
#include "higgs/cuda/ops.h"
#include "launch.h"
#include "quantize_row.cuh"
#include "trellis_table.h"

namespace higgs::cuda {
namespace {

constexpr int kPieces = 256;
constexpr int kMaxSteps = 32;   // of a run
constexpr float kLargest = 1444.0f;  // |X|: path costs stay below 2^24

// Runs of a row: those of a group of 256 columns, or of what the row has left.
struct Run {
  int first;  // column
  int steps;
  __device__ __forceinline__ Run(int k, int number)
      : first(number / 4 * kPieces + number % 4 * 4), steps(min(kPieces, k - number / 4 * kPieces) / 8) {}
  __device__ __forceinline__ int column(int step) const { return first + step / 2 * 16 + step % 2 * 2; }
};

__device__ __forceinline__ int own_cost(char2 v, int2 x) { return 4 * (v.x * v.x + v.y * v.y) - v.x * x.x - v.y * x.y; }

struct RunInput {
  int steps;
  const int2* x;  // X of the two weights of each step
};

// Pieces and the two tables in shared memory.
struct Tables {
  char2 lo[kPieces];
  char2 hi[kPieces];
};

// --- shift 1: 256 states. Path costs of all steps are kept, and the way back is found by comparing again. -----------
template <int Bits>
struct SearchOne {
  static constexpr int kThreads = 128;
  static constexpr int kOwn = kPieces / kThreads;  // pieces of a thread
  static constexpr int kFree = 1 << Bits;          // pieces that may precede one

  float cost[kMaxSteps + 1][kPieces];  // least cost of a path to each state, before the step
  float entry[2][kPieces];             // the same plus the cost of lo of the step
  float2 slope[kPieces];               // 8 lo
  uint8_t piece[kMaxSteps + 1];

  __device__ __forceinline__ void set_up(const Tables& t) {
    for (int i = threadIdx.x; i < kPieces; i += kThreads) slope[i] = make_float2(8.0f * t.lo[i].x, 8.0f * t.lo[i].y);
  }
  // The threads of a warp have pieces with the same predecessors, first_before(c) ..
  static __device__ __forceinline__ int own_piece(int i) {
    const int j = i * kThreads + threadIdx.x;
    return (j % kFree) << (8 - Bits) | j / kFree;
  }
  static __device__ __forceinline__ int first_before(int c) { return (c & ((1 << (8 - Bits)) - 1)) << Bits; }

  // Steps from, from + 1, .. (cyclic), `steps` in all; start: the state, or -1 for any.
  __device__ void sweep(const Tables& t, const RunInput& run, int from, int start) {
    char2 hi[kOwn];
    char2 lo[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int c = own_piece(i);
      hi[i] = t.hi[c];
      lo[i] = t.lo[c];
      cost[0][c] = start < 0 || c == start ? 0.0f : 1e30f;
      entry[0][c] = cost[0][c] + static_cast<float>(own_cost(lo[i], run.x[from]));
    }
    __syncthreads();
    for (int s = 0; s < run.steps; ++s) {
      const int at = from + s < run.steps ? from + s : from + s - run.steps;
      const int next = at + 1 < run.steps ? at + 1 : 0;
      float least[kOwn];
      search(entry[s % 2], hi, least);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int c = own_piece(i);
        const float total = least[i] + static_cast<float>(own_cost(hi[i], run.x[at]));
        cost[s + 1][c] = total;
        entry[(s + 1) % 2][c] = total + static_cast<float>(own_cost(lo[i], run.x[next]));
      }
      __syncthreads();
    }
  }
  __device__ __forceinline__ void search(const float* from, const char2 (&hi)[kOwn], float (&least)[kOwn]) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) least[i] = __int_as_float(0x7f800000);
    constexpr int kTogether = Bits == 8 ? kOwn : 1;  // pieces of a thread with the same predecessors
#pragma unroll
    for (int first = 0; first < kOwn; first += kTogether) {
      const int before = first_before(own_piece(first));
#pragma unroll 4
      for (int f = 0; f < kFree; f += 4) {
        const float4 e = *reinterpret_cast<const float4*>(from + before + f);
        const float4 ab = *reinterpret_cast<const float4*>(slope + before + f);
        const float4 cd = *reinterpret_cast<const float4*>(slope + before + f + 2);
#pragma unroll
        for (int i = first; i < first + kTogether; ++i) {
          const float h0 = hi[i].x;
          const float h1 = hi[i].y;
          const float a = fmaf(ab.y, h1, fmaf(ab.x, h0, e.x));
          const float b = fmaf(ab.w, h1, fmaf(ab.z, h0, e.y));
          const float c = fmaf(cd.y, h1, fmaf(cd.x, h0, e.z));
          const float d = fmaf(cd.w, h1, fmaf(cd.z, h0, e.w));
          least[i] = fminf(least[i], fminf(fminf(a, b), fminf(c, d)));
        }
      }
    }
  }
  // First warp: the lowest of the best states after `steps` steps.
  __device__ __forceinline__ int best_state(int steps) const {
    const int lane = threadIdx.x;
    int least = 0x7fffffff;
    int at = 0;
    for (int c = lane; c < kPieces; c += 32) take_lower(static_cast<int>(cost[steps][c]), c, least, at);
    return lowest(least, at);
  }
  // First warp: the best path into `state`, back to the state before step s; pieces at `piece[step]`.
  __device__ int trace(const Tables& t, const RunInput& run, int from, int state, int down_to) {
    for (int s = run.steps - 1; s >= down_to; --s) {
      const int at = from + s < run.steps ? from + s : from + s - run.steps;
      const int before = first_before(state);
      const char2 h = t.hi[state];
      int least = 0x7fffffff;
      int best = 0;
      for (int f = threadIdx.x; f < kFree; f += 32) {
        const char2 l = t.lo[before + f];
        const int edge = own_cost(l, run.x[at]) + 8 * (l.x * h.x + l.y * h.y);
        const float total = cost[s][before + f];
        take_lower(total < 1e29f ? static_cast<int>(total) + edge : 0x7ffffffe, before + f, least, best);
      }
      state = lowest(least, best);
      if (threadIdx.x == 0) piece[at] = static_cast<uint8_t>(state);
    }
    return state;
  }
  static __device__ __forceinline__ void take_lower(int value, int index, int& least, int& at) {
    if (value < least) {
      least = value;
      at = index;
    }
  }
  static __device__ __forceinline__ int lowest(int value, int index) {
    const int least = __reduce_min_sync(~0u, value);
    return __reduce_min_sync(~0u, value == least ? index : 0x7fffffff);
  }
  // All threads; the pieces of the run in `piece`.
  __device__ void encode(const Tables& t, const RunInput& run) {
    const int half = run.steps / 2;
    sweep(t, run, half, -1);
    if (threadIdx.x < 32) {
      const int start = trace(t, run, half, best_state(run.steps), run.steps - half);
      if (threadIdx.x == 0) piece[kMaxSteps] = static_cast<uint8_t>(start);
    }
    __syncthreads();
    const int start = piece[kMaxSteps];
    sweep(t, run, 0, start);
    if (threadIdx.x < 32) trace(t, run, 0, start, 0);
    __syncthreads();
  }
  __device__ __forceinline__ int piece_of(int step) const { return piece[step]; }
};

// --- 4 bits, shift 2: 4096 states of three nibbles n0 n1 n2; a step forgets n0 and adds n3 ---------------------------
// The nibble that was forgotten is kept in the lowest bits of a cost, so that the least cost also names it.
struct SearchTwo {
  static constexpr int kThreads = 256;
  static constexpr int kRow = 260;  // of 256 costs with the same n2; a row ahead is four banks ahead
  static constexpr int kNever = 1 << 25;

  int entry[2][16 * kRow];  // [n2][n1][n0]: 16 (least cost of a path to the state + cost of lo of the step) + n0
  int2 slope[kPieces];      // 128 lo of piece n0 | n1 << 4
  uint2 back[kMaxSteps][kPieces];  // [step][n2 | n3 << 4]: nibble n1 is n0 of the best path to state n1 n2 n3
  int state;

  __device__ __forceinline__ void set_up(const Tables& t) {
    slope[threadIdx.x] = make_int2(128 * t.lo[threadIdx.x].x, 128 * t.lo[threadIdx.x].y);
  }
  __device__ void sweep(const Tables& t, const RunInput& run, int from, int start) {
    const int n2 = threadIdx.x / 16;
    const int n3 = threadIdx.x % 16;
    const char2 hi = t.hi[n2 | n3 << 4];
    for (int i = 0; i < 16; ++i) {  // states i n2 n3
      const int number = i | n2 << 4 | n3 << 8;
      const int cost = start < 0 || start == number ? 0 : kNever;
      entry[0][n3 * kRow + n2 * 16 + i] = 16 * (cost + own_cost(t.lo[i | n2 << 4], run.x[from])) + i;
    }
    __syncthreads();
    for (int s = 0; s < run.steps; ++s) {
      const int at = from + s < run.steps ? from + s : from + s - run.steps;
      const int next = at + 1 < run.steps ? at + 1 : 0;
      const int* from_states = entry[s % 2] + n2 * kRow;
      int* to = entry[(s + 1) % 2] + n3 * kRow + n2 * 16;
      const int of_hi = own_cost(hi, run.x[at]);
      const bool last = s + 1 == run.steps;
      uint32_t nibbles[2] = {};
#pragma unroll
      for (int n1 = 0; n1 < 16; ++n1) {
        int least = 0x7fffffff;
#pragma unroll
        for (int n0 = 0; n0 < 16; n0 += 4) {
          const int4 e = *reinterpret_cast<const int4*>(from_states + n1 * 16 + n0);
          const int4 ab = *reinterpret_cast<const int4*>(slope + n1 * 16 + n0);
          const int4 cd = *reinterpret_cast<const int4*>(slope + n1 * 16 + n0 + 2);
          const int a = ab.y * hi.y + (ab.x * hi.x + e.x);
          const int b = ab.w * hi.y + (ab.z * hi.x + e.y);
          const int c = cd.y * hi.y + (cd.x * hi.x + e.z);
          const int d = cd.w * hi.y + (cd.z * hi.x + e.w);
          least = min(least, min(min(a, b), min(c, d)));
        }
        nibbles[n1 / 8] |= static_cast<uint32_t>(least & 15) << (n1 % 8 * 4);
        const int cost = (least >> 4) + of_hi;
        to[n1] = last ? cost : 16 * (cost + own_cost(t.lo[n1 | n2 << 4], run.x[next])) + n1;
      }
      back[s][n2 | n3 << 4] = make_uint2(nibbles[0], nibbles[1]);
      __syncthreads();
    }
  }
  // First warp: the lowest of the best states at the end.
  __device__ __forceinline__ int best_state(int steps) const {
    int least = 0x7fffffff;
    int at = 0;
    for (int i = threadIdx.x; i < 4096; i += 32) {
      const int cost = entry[steps % 2][i / 256 * kRow + i % 256];
      if (cost < least) {
        least = cost;
        at = i;
      }
    }
    const int all = __reduce_min_sync(~0u, least);
    return __reduce_min_sync(~0u, least == all ? at : 0x7fffffff);
  }
  // The state before step `down_to` on the best path into `end`; nibble n0 of each step's state goes to nibble[].
  __device__ int trace(const RunInput& run, int from, int end, int down_to, uint8_t* nibble) const {
    for (int s = run.steps - 1; s >= down_to; --s) {
      const uint2 n = back[s][end >> 4];
      const int n1 = end & 15;
      end = (end << 4 & 0xfff) | ((n1 < 8 ? n.x : n.y) >> (n1 % 8 * 4) & 15);
      const int at = from + s < run.steps ? from + s : from + s - run.steps;
      nibble[at] = static_cast<uint8_t>(end & 15);
    }
    return end;
  }
  uint8_t nibble[kMaxSteps];

  __device__ void encode(const Tables& t, const RunInput& run) {
    const int half = run.steps / 2;
    sweep(t, run, half, -1);
    if (threadIdx.x < 32) {
      const int best = best_state(run.steps);
      if (threadIdx.x == 0) state = trace(run, half, best, run.steps - half, nibble);
    }
    __syncthreads();
    const int start = state;
    sweep(t, run, 0, start);
    if (threadIdx.x == 0) trace(run, 0, start, 0, nibble);
    __syncthreads();
  }
  // steps of the run are a power of two or not: the piece after the last is the first
  __device__ __forceinline__ int piece_of(int step, int steps) const {
    return nibble[step] | nibble[step + 1 < steps ? step + 1 : 0] << 4;
  }
};

}  // namespace
}  // namespace higgs::cuda
