// Throughput of the core on this machine.
//
//   higgs_bench [--threads=N] [--isa=portable|avx2|avx512] [--benchmark_filter=...]
//
// Without options: one thread and the fastest instruction set. Columns: weights/s is weights of W processed a second
// (for matmul counted once a call, whatever m), bytes_per_second is packed bytes of W read (matmul, dequantize), or
// fp32 bytes read (quantize, fwht).
#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "higgs/higgs.h"

namespace higgs {
namespace {

constexpr std::int64_t kN = 4096;
constexpr std::int64_t kK = 4096;
constexpr std::int64_t kColdBytes = std::int64_t{256} << 20;  // several times the L3 cache of large machines

std::vector<float> gaussian(std::int64_t count) {
  std::mt19937_64 rng(1);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& v : values) v = normal(rng);
  return values;
}

LayerFormat make_format(const Grid& grid, std::int64_t n, std::int64_t k) {
  LayerFormat f;
  f.grid = &grid;
  f.n = n;
  f.k = k;
  f.block = default_block(k);
  f.group = default_group(k, f.block);
  return f;
}

// Any bytes are legal indices: no need to quantize.
struct Layer {
  LayerFormat format;
  std::vector<std::uint8_t> indices;
  std::vector<std::uint16_t> scales;

  explicit Layer(const LayerFormat& f)
      : format(f),
        indices(static_cast<std::size_t>(f.index_bytes())),
        scales(static_cast<std::size_t>(f.n * f.row_groups()), f32_to_f16(0.02f)) {
    std::uint64_t word = 0;
    for (std::uint8_t& b : indices) b = static_cast<std::uint8_t>(sign_word(7, word++) >> 32);
  }
  [[nodiscard]] PackedView view() const { return {format, indices.data(), scales.data(), nullptr}; }
};

void count_weights(benchmark::State& state, std::int64_t weights, std::int64_t bytes) {
  const auto calls = static_cast<std::int64_t>(state.iterations());
  state.counters["weights/s"] = benchmark::Counter(static_cast<double>(calls * weights), benchmark::Counter::kIsRate);
  state.SetBytesProcessed(calls * bytes);
}

void fwht_bench(benchmark::State& state) {
  std::vector<float> data = gaussian(1 << 16);  // stays in the L2 cache
  const auto block = static_cast<int>(state.range(0));
  for (auto _ : state) {
    fwht(data, block);
    benchmark::DoNotOptimize(data.data());
  }
  const auto size = static_cast<std::int64_t>(data.size());
  count_weights(state, size, 4 * size);
}

void quantize_bench(benchmark::State& state, const Grid* grid) {
  const LayerFormat f = make_format(*grid, grid->trellis == nullptr ? 512 : 32, kK);  // a search takes long
  const std::vector<float> w = gaussian(f.n * f.k);
  Layer layer(f);
  quantize(matrix(w.data(), f.n, f.k), f, nullptr, layer.indices.data(),
           layer.scales.data());  // builds the search table
  for (auto _ : state) {
    const QuantizeResult r =
        quantize(matrix(w.data(), f.n, f.k), f, nullptr, layer.indices.data(), layer.scales.data());
    benchmark::DoNotOptimize(r.error);
  }
  count_weights(state, f.n * f.k, 4 * f.n * f.k);
}

void dequantize_bench(benchmark::State& state, const Grid* grid) {
  const LayerFormat f = make_format(*grid, 512, kK);
  const Layer layer(f);
  std::vector<float> out(static_cast<std::size_t>(f.n * f.k));
  for (auto _ : state) {
    dequantize(layer.view(), matrix(out.data(), f.n, f.k));
    benchmark::DoNotOptimize(out.data());
  }
  count_weights(state, f.n * f.k, f.stored_bytes(false));
}

void matmul_bench(benchmark::State& state, const Grid* grid, std::int64_t m) {
  const LayerFormat f = make_format(*grid, kN, kK);
  const std::vector<float> x = gaussian(m * kK);
  std::vector<float> y(static_cast<std::size_t>(m * kN));
  // One token reads every weight once, from memory as in a model: walk over copies that no cache holds together.
  const std::int64_t copies = m == 1 ? kColdBytes / f.stored_bytes(false) + 1 : 1;
  const std::vector<Layer> layers(static_cast<std::size_t>(copies), Layer(f));
  std::size_t next = 0;
  for (auto _ : state) {
    matmul(matrix(x.data(), m, kK), layers[next].view(), nullptr, matrix(y.data(), m, kN));
    benchmark::DoNotOptimize(y.data());
    next = (next + 1) % layers.size();
  }
  count_weights(state, kN * kK, f.stored_bytes(false));
  state.counters["flop/s"] = benchmark::Counter(
      static_cast<double>(state.iterations()) * 2.0 * static_cast<double>(m * kN * kK), benchmark::Counter::kIsRate);
}

void register_all() {
  for (int block = kMinBlock; block <= kMaxBlock; block *= 2) {
    benchmark::RegisterBenchmark("fwht/block", fwht_bench)->Arg(block);
  }
  for (const Grid& grid : grids()) {
    const std::string name(grid.name);
    benchmark::RegisterBenchmark(("quantize/" + name).c_str(), quantize_bench, &grid)->UseRealTime();
  }
  for (const Grid& grid : grids()) {
    const std::string name(grid.name);
    benchmark::RegisterBenchmark(("dequantize/" + name).c_str(), dequantize_bench, &grid)->UseRealTime();
  }
  for (const std::int64_t m : {1, 16, 512}) {
    for (const Grid& grid : grids()) {
      const std::string name = "matmul/m" + std::to_string(m) + "/" + std::string(grid.name);
      benchmark::RegisterBenchmark(name.c_str(), matmul_bench, &grid, m)->UseRealTime()->Unit(benchmark::kMicrosecond);
    }
  }
}

// Takes the options of this program out of argv; true if they are all legal.
bool parse_options(int& argc, char** argv) {
  set_num_threads(1);
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option.starts_with("--threads=")) {
      set_num_threads(std::stoi(option.substr(10)));
    } else if (option.starts_with("--isa=")) {
      bool found = false;
      for (const Isa isa : supported_isas()) {
        if (option.substr(6) != name_of(isa)) continue;
        set_isa(isa);
        found = true;
      }
      if (!found) return false;
    } else {
      argv[kept++] = argv[i];
    }
  }
  argc = kept;
  return true;
}

}  // namespace
}  // namespace higgs

int main(int argc, char** argv) {
  try {
    if (!higgs::parse_options(argc, argv)) {
      std::fprintf(stderr, "--isa: this CPU has no such instruction set\n");
      return 2;
    }
    higgs::register_all();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 2;
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("isa", higgs::name_of(higgs::current_isa()));
  benchmark::AddCustomContext("threads", std::to_string(higgs::num_threads()));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
