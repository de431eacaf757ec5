// Threads over a range of units, for callers without a thread pool.
#pragma once

#include <cstdint>
#include <functional>

#include "qlora/qlora.h"

namespace qlora::python {

// Runs body(begin, end) on disjoint parts of [0, num_units), at least `min_units` each, on at most `num_threads`
// threads (0: as many as the processors that this process may use). Holds no GIL. A part's failure is raised as check()
// does.
void parallel_for(std::int64_t num_units, std::int64_t min_units, int num_threads,
                  const std::function<qlora_status(std::int64_t, std::int64_t)>& body);

// Raises for a failed call on this thread: ValueError for an argument, RuntimeError otherwise.
void check(qlora_status status);

}  // namespace qlora::python
