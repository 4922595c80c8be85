// The instruction sets the CPU kernels are compiled for, chosen at run time.
#pragma once

#include <vector>

namespace higgs {

enum class Isa { portable, avx2, avx512 };  // avx2: with FMA and F16C; avx512: F, BW, DQ, VL and VBMI

[[nodiscard]] const char* name_of(Isa isa) noexcept;
[[nodiscard]] std::vector<Isa> supported_isas();  // what was compiled in and this CPU has, slowest first
[[nodiscard]] Isa current_isa() noexcept;         // at first the fastest supported one
void set_isa(Isa isa);                            // for tests and measurements; throws Error(unsupported)

}  // namespace higgs
