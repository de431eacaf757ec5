// A second stream for the length of a call, for work that runs beside the call's own stream.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device_guard.h"

namespace qlora {

// A stream of the highest priority with two events, borrowed from a pool. The call's stream may be under capture into a
// CUDA graph; the side stream then joins the capture with its first wait. What was begun on it and not waited for when
// the call ends, because it failed, `main` waits for then.
class SideStream {
 public:
  SideStream(const Device& device, cudaStream_t main);
  ~SideStream();
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  cudaStream_t get() const { return resources_.stream; }

  // What the main stream was given before mark_main ends before what the side stream is given after await_main begins.
  void mark_main();
  void await_main();
  // The same with the streams exchanged.
  void mark_side();
  void await_side();

  struct Resources {
    cudaStream_t stream = nullptr;
    cudaEvent_t main = nullptr;
    cudaEvent_t side = nullptr;
    cudaStream_t served = nullptr;  // the stream of the latest call
  };

 private:
  int device_;
  cudaStream_t main_;
  Resources resources_;
  bool is_ahead_ = false;  // the side stream has work that main does not wait for yet
};

}  // namespace qlora
