// What is compiled once per decoder (a line of instances.h).
#pragma once

#include <cstdint>

#include "gemm_params.h"
#include "gemv_params.h"
#include "grouped_params.h"
#include "higgs/cuda/grouped.h"
#include "higgs/cuda/plan.h"
#include "higgs/cuda/tiled_format.h"

namespace higgs::cuda {

// The sizes repack and its inverses work with.
struct TiledLayer {
  TiledFormat tiled;
  std::int64_t n = 0;
  std::int64_t k = 0;
  std::int64_t group = 0;
  std::int64_t row_bytes = 0;  // of the stored indices
};

struct DecoderOps {
  FieldShape field;
  void (*gemv)(const LaunchPlan& plan, const GemvParams& params, Stream stream);
  void (*gemm)(const GemmPlan& plan, const GemmParams& params, Stream stream);
  void (*grouped)(const GroupedPlan& plan, const GroupedParams& params, Stream stream);  // not of a trellis
  void (*repack)(const TiledLayer& layer, const std::uint8_t* indices, std::uint8_t* weights, Stream stream);
  void (*unrepack)(const TiledLayer& layer, const std::uint8_t* weights, std::uint8_t* indices, Stream stream);
  void (*dequantize_rotated)(const TiledLayer& layer, const std::uint8_t* tiled, void* out, DType dtype, Stream stream);
};

// Throws Error(unsupported) if there is no such instance.
[[nodiscard]] const DecoderOps& decoder_ops(FieldShape field);

}  // namespace higgs::cuda
