// Reads numbers from the bytes of a fuzzer; zeros when they have run out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace higgs::fuzz {

class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  template <typename T>
  T take() {
    T value{};
    fill(&value, sizeof value);
    return value;
  }
  void fill(void* out, std::size_t count) {
    const std::size_t given = count < size_ ? count : size_;
    if (given != 0) std::memcpy(out, data_, given);
    if (count != given) std::memset(static_cast<std::uint8_t*>(out) + given, 0, count - given);
    data_ += given;
    size_ -= given;
  }
  [[nodiscard]] std::size_t size() const { return size_; }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}

}  // namespace higgs::fuzz
