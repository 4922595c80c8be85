// Everything public of the core.
#pragma once

#include "higgs/allocate.h"       // IWYU pragma: export
#include "higgs/error.h"          // IWYU pragma: export
#include "higgs/grid.h"           // IWYU pragma: export
#include "higgs/hadamard.h"       // IWYU pragma: export
#include "higgs/isa.h"            // IWYU pragma: export
#include "higgs/matmul.h"         // IWYU pragma: export
#include "higgs/numeric.h"        // IWYU pragma: export
#include "higgs/pack.h"           // IWYU pragma: export
#include "higgs/packed_format.h"  // IWYU pragma: export
#include "higgs/parallel_for.h"   // IWYU pragma: export
#include "higgs/quantize.h"       // IWYU pragma: export
#include "higgs/reference.h"      // IWYU pragma: export
#include "higgs/tensor_view.h"    // IWYU pragma: export
