// How a failure travels: inside the library an Error is thrown; every C entry point runs its body through guarded(),
// which turns it into a status and keeps the text for qlora_last_error().
#pragma once

#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "qlora/qlora.h"

namespace qlora {

class Error : public std::runtime_error {
 public:
  Error(qlora_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  qlora_status status() const { return status_; }

 private:
  qlora_status status_;
};

// Keeps the text for qlora_last_error() of this thread; returns `status`.
qlora_status set_last_error(qlora_status status, const char* message) noexcept;

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <typename... Parts>
[[noreturn]] void fail(qlora_status status, const Parts&... parts) {
  throw Error(status, concat(parts...));
}

// Throws QLORA_INVALID_ARGUMENT unless `condition`; the parts name the argument, what was expected and what came.
template <typename... Parts>
void expect(bool condition, const Parts&... parts) {
  if (!condition) fail(QLORA_INVALID_ARGUMENT, parts...);
}

template <typename Body>
qlora_status guarded(Body&& body) noexcept {
  try {
    std::forward<Body>(body)();
    return QLORA_OK;
  } catch (const Error& error) {
    return set_last_error(error.status(), error.what());
  } catch (const std::exception& error) {
    return set_last_error(QLORA_INTERNAL_ERROR, error.what());
  } catch (...) {
    return set_last_error(QLORA_INTERNAL_ERROR, "unknown exception");
  }
}

}  // namespace qlora
