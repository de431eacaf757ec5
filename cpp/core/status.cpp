#include "core/status.h"

namespace qlora {
namespace {

std::string& last_error() {
  thread_local std::string text;
  return text;
}

}  // namespace

qlora_status set_last_error(qlora_status status, const char* message) noexcept {
  try {
    last_error() = message;
  } catch (...) {  // Out of memory: the status alone has to do.
  }
  return status;
}

}  // namespace qlora

const char* qlora_last_error(void) { return qlora::last_error().c_str(); }
