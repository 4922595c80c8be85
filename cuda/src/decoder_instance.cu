// The kernels of one decoder; compiled once per line of instances.h with HIGGS_DECODER_NAME and HIGGS_DECODER defined.
#include "decoder_ops.h"
#include "gemm_mma.cuh"
#include "gemm_sm90.cuh"
#include "gemv.cuh"
#include "gemv_trellis.cuh"
#include "grouped.cuh"
#include "launch.h"
#include "repack.cuh"
#include "repack_trellis.cuh"

namespace higgs::cuda {
namespace {

using D = HIGGS_DECODER;

// For integer products.
template <typename Decoder, bool Trellis = Decoder::kShape.trellis()>
struct BytesOf {
  using Type = ByteQuadDecoder<Decoder>;
};
template <typename Decoder>
struct BytesOf<Decoder, true> {
  using Type = SumTrellisDecoder<Decoder::kShape.bits>;
};
using Bytes = BytesOf<D>::Type;

template <typename Config>
void launch_gemm(const GemmParams& params, const GemmPlan& plan, Stream stream) {
  static_assert(Config::kWarpgroups * 64 == gemm_rows(Config::kN, D::kShape));
  launch_dependent<gemm_kernel<Config>>(
      {plan.ctas(), Config::kThreads, Config::kSharedBytes, plan.cluster_size << plan.k_split_log}, stream, params);
}

template <typename Config>
void launch_trellis(const GemvParams& params, const LaunchPlan& plan, Stream stream) {
  launch_dependent<gemv_trellis_kernel<Config>>({plan.ctas(), plan.threads(), plan.shared_bytes, plan.cluster}, stream,
                                                params);
}

template <typename T>
void gemv_trellis(const LaunchPlan& plan, const GemvParams& params, Stream stream) {
  if (!plan.regular) return launch_trellis<TrellisConfig<D, T, 16, false>>(params, plan, stream);
  if (plan.rows > 8) return launch_trellis<TrellisConfig<D, T, 16, true>>(params, plan, stream);
  if (plan.rows > 4) return launch_trellis<TrellisConfig<D, T, 8, true>>(params, plan, stream);
  launch_trellis<TrellisConfig<D, T, 4, true>>(params, plan, stream);
}

template <typename T, int TokenTiles, Loop kLoop>
void gemv(const LaunchPlan& plan, const GemvParams& params, Stream stream) {
  launch_dependent<gemv_kernel<GemvConfig<D, T, TokenTiles, kLoop>>>(
      {plan.ctas(), plan.threads(), plan.shared_bytes, plan.cluster}, stream, params);
}

template <typename T>
void gemv_prepared(const LaunchPlan& plan, const GemvParams& params, Stream stream) {
  constexpr int kTilesOf8 = uses_bytes(D::kShape, true) ? 2 : 1;
  if constexpr (prepares_x(D::kShape, 16)) {
    if (plan.rows > 8) return gemv<T, 2 * kTilesOf8, Loop::prepared>(plan, params, stream);
  }
  if constexpr (prepares_x(D::kShape, 8)) gemv<T, kTilesOf8, Loop::prepared>(plan, params, stream);
}

template <typename T>
void gemv(const LaunchPlan& plan, const GemvParams& params, Stream stream) {
  if constexpr (D::kShape.trellis()) {
    gemv_trellis<T>(plan, params, stream);
  } else if (plan.paired) {
    if constexpr (uses_bytes(D::kShape, true)) {
      if (plan.token_tiles == 4) return gemv<T, 4, Loop::paired>(plan, params, stream);
    }
    plan.token_tiles == 1 ? gemv<T, 1, Loop::paired>(plan, params, stream)
                          : gemv<T, 2, Loop::paired>(plan, params, stream);
  } else if (plan.prepared) {
    gemv_prepared<T>(plan, params, stream);
  } else if (plan.regular) {
    if constexpr (uses_bytes(D::kShape, true)) {
      if (plan.token_tiles == 2) return gemv<T, 2, Loop::held>(plan, params, stream);
    }
    if constexpr (holds_x(D::kShape)) gemv<T, 1, Loop::held>(plan, params, stream);
  } else {
    plan.token_tiles == 1 ? gemv<T, 1, Loop::general>(plan, params, stream)
                          : gemv<T, 2, Loop::general>(plan, params, stream);
  }
}

void gemv(const LaunchPlan& plan, const GemvParams& params, Stream stream) {
  plan.dtype == DType::f16 ? gemv<__half>(plan, params, stream) : gemv<__nv_bfloat16>(plan, params, stream);
}

template <typename T, bool Regular>
void gemm(const GemmPlan& plan, const GemmParams& params, Stream stream) {
  switch (plan.tokens) {
    case 16:
      if constexpr (Regular && gemm_byte_tokens(D::kShape) >= 16) {
        if (plan.bytes) return launch_gemm<GemmConfig<Bytes, T, 16, true>>(params, plan, stream);
      }
      return launch_gemm<GemmConfig<D, T, 16, Regular>>(params, plan, stream);
    case 32:
      if constexpr (Regular && gemm_byte_tokens(D::kShape) >= 32) {
        if (plan.bytes) return launch_gemm<GemmConfig<Bytes, T, 32, true>>(params, plan, stream);
      }
      return launch_gemm<GemmConfig<D, T, 32, Regular>>(params, plan, stream);
    case 64: return launch_gemm<GemmConfig<D, T, 64, Regular>>(params, plan, stream);
    case 128: return launch_gemm<GemmConfig<D, T, 128, Regular>>(params, plan, stream);
    default:
      if constexpr (gemm_max_tokens(D::kShape, Regular) == 256) {
        return launch_gemm<GemmConfig<D, T, 256, Regular>>(params, plan, stream);
      }
  }
}

template <typename T, int Tokens>
void gemm_mma(const GemmPlan& plan, const GemmParams& params, Stream stream) {
  using Config = MmaConfig<D, T, Tokens>;
  const int shared_bytes = current_device().sm() == 90 ? Config::kSharedBytes90 : Config::kSharedBytes;
  launch_dependent<gemm_mma_kernel<Config>>({plan.ctas(), Config::kThreads, shared_bytes}, stream, params);
}

template <typename T>
void gemm(const GemmPlan& plan, const GemmParams& params, Stream stream) {
  if constexpr (!D::kShape.trellis()) {
    if (plan.kernel == GemmKernel::mma) {
      return plan.tokens == 32 ? gemm_mma<T, 32>(plan, params, stream) : gemm_mma<T, 64>(plan, params, stream);
    }
  }
  plan.regular ? gemm<T, true>(plan, params, stream) : gemm<T, false>(plan, params, stream);
}

void gemm(const GemmPlan& plan, const GemmParams& params, Stream stream) {
  plan.dtype == DType::f16 ? gemm<__half>(plan, params, stream) : gemm<__nv_bfloat16>(plan, params, stream);
}

template <typename T, int TokenTiles>
void grouped(const GroupedPlan& plan, const GroupedParams& params, Stream stream) {
  launch_dependent<grouped_kernel<GroupedConfig<D, T, TokenTiles>>>({plan.ctas, plan.threads(), plan.shared_bytes},
                                                                    stream, params);
}

template <typename T>
void grouped(const GroupedPlan& plan, const GroupedParams& params, Stream stream) {
  if constexpr (!D::kShape.trellis()) {
    plan.token_tiles == 1 ? grouped<T, 1>(plan, params, stream) : grouped<T, 2>(plan, params, stream);
  }
}

void grouped(const GroupedPlan& plan, const GroupedParams& params, Stream stream) {
  plan.dtype == DType::f16 ? grouped<__half>(plan, params, stream) : grouped<__nv_bfloat16>(plan, params, stream);
}

constexpr int kThreads = 128;
unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

template <typename Decoder>
void repack(const TiledLayer& layer, const uint8_t* indices, uint8_t* weights, Stream stream) {
  const unsigned blocks = blocks_for(unit_threads(layer.tiled));
  auto* words = reinterpret_cast<uint32_t*>(weights);
  if constexpr (Decoder::kShape.trellis()) {
    repack_trellis_kernel<Decoder::kShape.bits><<<blocks, kThreads, 0, to_stream(stream)>>>(layer, indices, words);
  } else {
    repack_kernel<Decoder><<<blocks, kThreads, 0, to_stream(stream)>>>(layer, indices, words);
  }
  check(cudaGetLastError(), "repack");
}

template <typename Decoder>
void unrepack(const TiledLayer& layer, const uint8_t* weights, uint8_t* indices, Stream stream) {
  const auto* words = reinterpret_cast<const uint32_t*>(weights);
  if constexpr (Decoder::kShape.trellis()) {
    const int64_t runs = layer.n * ((layer.k + kRunGroup - 1) / kRunGroup) * 4;
    unrepack_trellis_kernel<Decoder::kShape.bits>
        <<<blocks_for(runs), kThreads, 0, to_stream(stream)>>>(layer, words, indices);
  } else {
    const int64_t threads = layer.n * (layer.k / kColumnAlignment);
    unrepack_kernel<Decoder><<<blocks_for(threads), kThreads, 0, to_stream(stream)>>>(layer, words, indices);
  }
  check(cudaGetLastError(), "unrepack");
}

void dequantize_rotated(const TiledLayer& layer, const uint8_t* tiled, void* out, DType dtype, Stream stream) {
  constexpr int kBlock = 512;
  const auto needed = static_cast<unsigned>((unit_threads(layer.tiled) + kBlock - 1) / kBlock);
  const unsigned blocks = std::min(needed, 3u * static_cast<unsigned>(current_device().multiprocessors));
  dispatch(dtype, [&]<typename T>() {
    constexpr int kShared = GemmTable<D, T>::Table::kTableBytes;
    allow_shared<dequantize_tiled_kernel<D, T>>(kShared);
    dequantize_tiled_kernel<D, T><<<blocks, kBlock, kShared, to_stream(stream)>>>(layer, tiled, static_cast<T*>(out));
  });
  check(cudaGetLastError(), "dequantize_rotated");
}

}  // namespace

#define HIGGS_CONCAT_(a, b) a##b
#define HIGGS_CONCAT(a, b) HIGGS_CONCAT_(a, b)

extern const DecoderOps HIGGS_CONCAT(ops_, HIGGS_DECODER_NAME);
const DecoderOps HIGGS_CONCAT(ops_, HIGGS_DECODER_NAME){D::kShape,         gemv, gemm, grouped, repack<D>, unrepack<D>,
                                                        dequantize_rotated};

}  // namespace higgs::cuda
