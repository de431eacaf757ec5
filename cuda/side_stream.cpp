#include "cuda/side_stream.h"

#include <map>
#include <mutex>
#include <vector>

namespace qlora {
namespace {

using Resources = SideStream::Resources;

// What no call is using. Never destroyed: at process exit CUDA may be gone before it.
struct Pool {
  std::mutex mutex;
  std::map<int, std::vector<Resources>> free;  // by device
};

// A device's free side streams, from which on calls of other streams than before share them.
constexpr size_t kManyStreams = 64;

Pool& pool() {
  static Pool* const made = new Pool;
  return *made;
}

// 0: not under capture; kNoCapture: of one that has failed and was not ended yet, which has no number.
constexpr unsigned long long kNoCapture = ~0ull;
unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  check_cuda(cudaStreamGetCaptureInfo(stream, &status, &capture), "cudaStreamGetCaptureInfo");
  if (status == cudaStreamCaptureStatusNone) return 0;
  return status == cudaStreamCaptureStatusActive ? capture : kNoCapture;
}

// While another stream is under capture, a thread may make streams and events only in the relaxed mode.
class RelaxedCapture {
 public:
  RelaxedCapture() { check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  ~RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

Resources make_resources() {
  const RelaxedCapture relaxed;
  int lowest = 0;
  int highest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange");
  Resources made;
  check_cuda(cudaStreamCreateWithPriority(&made.stream, cudaStreamNonBlocking, highest),
             "cudaStreamCreateWithPriority");
  check_cuda(cudaEventCreateWithFlags(&made.main, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  check_cuda(cudaEventCreateWithFlags(&made.side, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return made;
}

// One that served the same stream, so that the work of independent streams stays independent: a side stream waits for
// all that its former calls wait for. A stream that took part in a capture belongs to it until it ends: it serves only
// calls of the same capture.
Resources borrow(int device, cudaStream_t main) {
  const unsigned long long capture = capture_of(main);
  {
    Pool& shared = pool();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    std::vector<Resources>& free = shared.free[device];
    for (const bool is_shared : {false, true}) {
      if (is_shared && free.size() < kManyStreams) break;
      for (Resources& candidate : free) {
        if (!is_shared && candidate.served != main) continue;
        const unsigned long long its_capture = capture_of(candidate.stream);
        if (its_capture != 0 && its_capture != capture) continue;
        const Resources found = candidate;
        candidate = free.back();
        free.pop_back();
        return found;
      }
    }
  }
  return make_resources();
}

void wait(cudaStream_t stream, cudaEvent_t event) {
  check_cuda(cudaStreamWaitEvent(stream, event, 0), "cudaStreamWaitEvent");
}

void record(cudaEvent_t event, cudaStream_t stream) { check_cuda(cudaEventRecord(event, stream), "cudaEventRecord"); }

}  // namespace

SideStream::SideStream(const Device& device, cudaStream_t main)
    : device_(device.index), main_(main), resources_(borrow(device.index, main)) {
  resources_.served = main;
}

SideStream::~SideStream() {
  if (is_ahead_) {
    (void)cudaEventRecord(resources_.side, resources_.stream);
    (void)cudaStreamWaitEvent(main_, resources_.side, 0);
  }
  try {
    Pool& shared = pool();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    shared.free[device_].push_back(resources_);
  } catch (...) {  // Out of memory: the stream is lost, the call was not.
  }
}

void SideStream::mark_main() { record(resources_.main, main_); }

void SideStream::await_main() {
  wait(resources_.stream, resources_.main);
  is_ahead_ = true;
}

void SideStream::mark_side() { record(resources_.side, resources_.stream); }

void SideStream::await_side() {
  wait(main_, resources_.side);
  is_ahead_ = false;
}

}  // namespace qlora
