// Error type of the public interface. Every public function checks its arguments once and throws higgs::Error with a
// message that gives the offending value and the legal set.
#pragma once

#include <stdexcept>
#include <string>

namespace higgs {

enum class ErrorCode {
  invalid_argument,  // Python: ValueError
  type,              // Python: TypeError
  unsupported,       // Python: higgs.UnsupportedError
  format,            // Python: higgs.FormatError
  io,                // Python: OSError
  cuda,              // Python: higgs.CudaError
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  [[nodiscard]] ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace higgs
