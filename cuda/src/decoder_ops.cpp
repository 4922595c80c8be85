#include "decoder_ops.h"

#include <string>

#include "higgs/error.h"
#include "instances.h"

namespace higgs::cuda {

#define HIGGS_DECLARE(name, decoder, grids) extern const DecoderOps ops_##name;
HIGGS_DECODERS(HIGGS_DECLARE)
#undef HIGGS_DECLARE

const DecoderOps& decoder_ops(FieldShape field) {
#define HIGGS_ADDRESS(name, decoder, grids) &ops_##name,
  static const DecoderOps* const all[] = {HIGGS_DECODERS(HIGGS_ADDRESS)};
#undef HIGGS_ADDRESS
  for (const DecoderOps* ops : all) {
    if (ops->field == field) return *ops;
  }
  throw Error(ErrorCode::unsupported, "no kernel instance for fields of " + std::to_string(field.bits) + " bits and " +
                                          std::to_string(field.weights) + " weights");
}

}  // namespace higgs::cuda
