// What this build is; the two macros come from CMakeLists.txt.
#include "qlora/qlora.h"

const char* qlora_version(void) { return QLORA_VERSION; }

const char* qlora_cuda_architectures(void) { return QLORA_CUDA_ARCHITECTURES; }
