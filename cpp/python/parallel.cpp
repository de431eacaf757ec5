#include "python/parallel.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace qlora::python {
namespace {

struct Outcome {
  qlora_status status = QLORA_OK;
  std::string text;
};

void raise(const Outcome& outcome) {
  if (outcome.status == QLORA_OK) return;
  if (outcome.status == QLORA_INVALID_ARGUMENT) throw pybind11::value_error("qlora." + outcome.text);
  throw std::runtime_error("qlora." + outcome.text);
}

}  // namespace

void parallel_for(std::int64_t num_units, std::int64_t min_units, int num_threads,
                  const std::function<qlora_status(std::int64_t, std::int64_t)>& body) {
  const std::int64_t available = num_threads > 0 ? num_threads : std::max(1u, std::thread::hardware_concurrency());
  const std::int64_t num_parts =
      std::max<std::int64_t>(1, std::min(available, num_units / std::max<std::int64_t>(1, min_units)));
  std::vector<Outcome> outcomes(static_cast<std::size_t>(num_parts));
  const auto run = [&](std::int64_t part) {
    Outcome& outcome = outcomes[static_cast<std::size_t>(part)];
    outcome.status = body(num_units * part / num_parts, num_units * (part + 1) / num_parts);
    if (outcome.status != QLORA_OK) outcome.text = qlora_last_error();  // Of this thread, so taken here.
  };
  {
    pybind11::gil_scoped_release release;
    std::vector<std::thread> threads;
    threads.reserve(static_cast<std::size_t>(num_parts - 1));
    std::int64_t started = 1;
    try {
      for (; started < num_parts; ++started) threads.emplace_back(run, started);
    } catch (const std::system_error&) {  // No more threads to be had: the rest runs here.
    }
    run(0);
    for (std::int64_t part = started; part < num_parts; ++part) run(part);
    for (std::thread& thread : threads) thread.join();
  }
  for (const Outcome& outcome : outcomes) raise(outcome);
}

void check(qlora_status status) {
  if (status != QLORA_OK) raise({status, qlora_last_error()});
}

}  // namespace qlora::python
