/// \file qlora.h
/// The C interface of libqlora: 4-bit (NF4, FP4) weights with optional double quantisation, on CPU and CUDA.
///
/// The format is bitsandbytes' own, to the bit (docs/format.md): a weight of shape [rows, cols] is flattened row by row
/// and cut into blocks of `block_size` values; a block stores one fp32 scale, its largest magnitude ("absmax"), and a
/// 4-bit code for each value. Byte i holds the value 2i in its high nibble and 2i+1 in its low nibble. Blocks run over
/// the flattened weight, so they straddle rows where cols is no multiple of block_size; the last block may be partial.
/// Double quantisation stores absmax itself in 8 bits: absmax[b] = code[q[b]] * scale[b / 256] + offset.
///
/// Conventions
/// - Every function returns a status. After a failure qlora_last_error() says what was expected and what came.
/// - Nothing throws, exits or prints. Device memory is never allocated for the caller: a workspace is asked for with
///   the function's _workspace_size twin and passed in. (The dense GEMM path keeps cuBLAS handles: for each
///   device as many as calls ever ran at once.)
/// - Sizes are 64-bit. A pointer may be null only where its parameter says so.
/// - `_cpu` functions take a half-open range of units and touch only these; the caller runs disjoint ranges in
///   parallel.
/// - `_cuda` functions take raw device pointers, a device index and a cudaStream_t; they are asynchronous. They make
///   `device` current for the calling thread and restore the former one. Without CUDA in the build they return
///   QLORA_UNSUPPORTED.
/// - Outputs must not alias inputs.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define QLORA_API __declspec(dllexport)
#else
#define QLORA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum qlora_status {
  QLORA_OK = 0,
  QLORA_INVALID_ARGUMENT = 1,  ///< The call breaks this header's contract.
  QLORA_UNSUPPORTED = 2,       ///< No kernel of this build serves the problem on this device.
  QLORA_CUDA_ERROR = 3,        ///< A CUDA or cuBLAS call failed.
  QLORA_INTERNAL_ERROR = 4,    ///< A fault of this library.
} qlora_status;

/// Type of activations, outputs and unquantised weights.
typedef enum qlora_dtype {
  QLORA_FLOAT32 = 0,
  QLORA_FLOAT16 = 1,
  QLORA_BFLOAT16 = 2,
} qlora_dtype;

/// The 16-value code book (cpp/core/format.h).
typedef enum qlora_format {
  QLORA_NF4 = 0,
  QLORA_FP4 = 1,
} qlora_format;

/// A cudaStream_t; null is the legacy default stream.
typedef void* qlora_stream;

/// A 4-bit weight. All pointers live on the device of the call; none is owned.
typedef struct qlora_weight_4bit {
  const uint8_t* packed;        ///< [(rows * cols + 1) / 2] codes, two a byte.
  const float* absmax;          ///< [num_blocks] fp32 scales, or null where the scales are double-quantised.
  const uint8_t* absmax_codes;  ///< [num_blocks] 8-bit scales, or null where they are plain fp32.
  const float* nested_absmax;   ///< [ceil(num_blocks / 256)] with absmax_codes, else null.
  const float* nested_code;     ///< [256] code book of the scales with absmax_codes, else null.
  const float* nested_offset;   ///< [1] mean that was taken off the scales with absmax_codes, else null.
  int64_t rows;                 ///< Output features n of a linear layer; rows of an embedding. At least 0.
  int64_t cols;                 ///< Input features k of a linear layer; width of an embedding. At least 0.
  int64_t block_size;           ///< 32, 64, 128, 256, 512, 1024, 2048 or 4096.
  qlora_format format;
} qlora_weight_4bit;

/// Largest rank of a qlora_lora.
#define QLORA_MAX_RANK 256

/// A LoRA adapter of a linear layer with a weight [n, k]: y gains scaling (x A^T) B^T. Its matrices may be of another
/// dtype than the activations, and of different ones; in products they are rounded to the dtype of the activations.
typedef struct qlora_lora {
  const void* a;        ///< A [rank, k], contiguous.
  const void* b;        ///< B [n, rank], contiguous.
  qlora_dtype a_dtype;  ///< Of A and of its gradient.
  qlora_dtype b_dtype;  ///< Of B and of its gradient.
  int64_t rank;         ///< 1 to QLORA_MAX_RANK.
  float scaling;        ///< lora_alpha / rank, or any other number.
} qlora_lora;

/// The 256-entry code book of double-quantised scales, ascending ("dynamic" signed 8-bit map). Static storage on the
/// host.
QLORA_API const float* qlora_nested_code(void);

/// The last failure's text on the calling thread; "" if there was none. Valid until the thread's next failure.
QLORA_API const char* qlora_last_error(void);

/// Version as "major.minor.patch".
QLORA_API const char* qlora_version(void);

/// The architectures compiled in, for example "sm_80 sm_90a"; "" for a build without CUDA.
QLORA_API const char* qlora_cuda_architectures(void);

/// The vector instructions that the CPU kernels use on this machine: "avx512", "avx2" or "plain". The environment
/// variable QLORA_CPU_KERNELS=avx512|avx2|plain lowers the choice; a level that the machine lacks is not taken.
QLORA_API const char* qlora_cpu_kernels(void);

/// A CUDA device.
typedef struct qlora_device_properties {
  char name[256];  ///< As the driver calls it.
  int32_t major;   ///< Compute capability.
  int32_t minor;
  int32_t num_multiprocessors;
  int32_t has_kernels;  ///< 1 if this build has code for the device, else 0.
  int64_t l2_bytes;
  int64_t total_bytes;  ///< Device memory.
} qlora_device_properties;

/// \param[out] count  CUDA devices that this process sees; 0 for a build without CUDA and where there is no driver. A
///                    driver that is too old for the build's CUDA runtime is QLORA_CUDA_ERROR.
QLORA_API qlora_status qlora_device_count(int32_t* count);

/// \param[in]  device      In [0, count).
/// \param[out] properties  Not null.
QLORA_API qlora_status qlora_device_info(int32_t device, qlora_device_properties* properties);

/// Writes which linear kernel would serve the problem, and why each kernel before it in the table would not, as text.
/// \param[in]  weight    Only rows, cols, block_size, format and whether pointers are null are read.
/// \param[in]  m         Rows of the activations.
/// \param[in]  is_grad   0 for y = x W^T + b, 1 for dx = dy W.
/// \param[out] text      Buffer of `size` bytes; the text is cut to it and null-terminated.
QLORA_API qlora_status qlora_explain_linear_4bit(const qlora_weight_4bit* weight, int64_t m, qlora_dtype dtype,
                                                 int is_grad, int32_t device, char* text, int64_t size);

// ---------------------------------------------------------------------------------------------------------------------
// Quantise: packed[i] = nearest code of x[i] / absmax[block], absmax[b] = max |x| over block b.
// A zero block stores absmax 0 and the code of +0. A block with a NaN stores absmax NaN, so that all of it dequantises
// to NaN: damage shows. A block with an Inf stores absmax Inf: the Inf survives, the rest dequantises to NaN. The same
// on CPU and CUDA (docs/format.md compares with bitsandbytes).

/// \param[in]  x           [n] values of `dtype`, contiguous.
/// \param[in]  n           Number of values; 0 is a no-op.
/// \param[in]  block_begin First block of this call; with block_end, units are blocks of the flattened tensor.
/// \param[out] packed      [(n + 1) / 2]; only the bytes of the given blocks are written.
/// \param[out] absmax      [ceil(n / block_size)] fp32.
QLORA_API qlora_status qlora_quantize_4bit_cpu(const void* x, qlora_dtype dtype, int64_t n, int64_t block_size,
                                               qlora_format format, uint8_t* packed, float* absmax, int64_t block_begin,
                                               int64_t block_end);
QLORA_API qlora_status qlora_quantize_4bit_cuda(const void* x, qlora_dtype dtype, int64_t n, int64_t block_size,
                                                qlora_format format, uint8_t* packed, float* absmax, int32_t device,
                                                qlora_stream stream);

/// Dequantise: y[i] = round(code_book[packed[i]] * absmax[block]), one rounding from fp32 to `dtype`.
/// Double-quantised scales are decoded in the same pass.
/// \param[out] y  [rows, cols] of `dtype`, contiguous.
/// Units of the CPU form: blocks of the flattened weight.
QLORA_API qlora_status qlora_dequantize_4bit_cpu(const qlora_weight_4bit* weight, void* y, qlora_dtype dtype,
                                                 int64_t block_begin, int64_t block_end);
QLORA_API qlora_status qlora_dequantize_4bit_cuda(const qlora_weight_4bit* weight, void* y, qlora_dtype dtype,
                                                  int32_t device, qlora_stream stream);

/// Double quantisation of scales: codes[b] = nearest entry of nested_code to (absmax[b] - offset) / nested_absmax[g],
/// g = b / 256.
/// \param[in]  absmax         [n] fp32.
/// \param[in]  nested_offset  [1] fp32, usually the mean of absmax.
/// \param[in]  nested_code    [256] ascending fp32 code book.
/// \param[out] codes          [n].
/// \param[out] nested_absmax  [ceil(n / 256)].
/// Units of the CPU form: groups of 256 scales.
QLORA_API qlora_status qlora_quantize_absmax_cpu(const float* absmax, int64_t n, const float* nested_offset,
                                                 const float* nested_code, uint8_t* codes, float* nested_absmax,
                                                 int64_t group_begin, int64_t group_end);
QLORA_API qlora_status qlora_quantize_absmax_cuda(const float* absmax, int64_t n, const float* nested_offset,
                                                  const float* nested_code, uint8_t* codes, float* nested_absmax,
                                                  int32_t device, qlora_stream stream);

/// absmax[b] = nested_code[codes[b]] * nested_absmax[b / 256] + nested_offset (product and sum rounded separately).
/// Units of the CPU form: scales.
QLORA_API qlora_status qlora_dequantize_absmax_cpu(const uint8_t* codes, int64_t n, const float* nested_absmax,
                                                   const float* nested_code, const float* nested_offset, float* absmax,
                                                   int64_t begin, int64_t end);
QLORA_API qlora_status qlora_dequantize_absmax_cuda(const uint8_t* codes, int64_t n, const float* nested_absmax,
                                                    const float* nested_code, const float* nested_offset, float* absmax,
                                                    int32_t device, qlora_stream stream);

// ---------------------------------------------------------------------------------------------------------------------
// Calibration.

#define QLORA_MAX_ROUND_COLUMNS 32

/// Rounds columns of a weight to NF4 one after the other, each rounding moving those that are still open. With
/// open = values, for j = 0, 1, ... num_columns - 1, each product, difference and sum rounded to fp32:
///   rounded[j] = code value nearest to open[j] * inverse[j], times scales[j]
///   change[j]  = previous[j] - rounded[j]                 without `previous`: open[j] - rounded[j]
///   open[l]   += coupling[j, l] * change[j]               for l > j
/// All matrices are transposed, so that a column of the weight is contiguous.
/// \param[in]  values, scales, inverse  [num_columns, rows].
/// \param[in]  previous                 [num_columns, rows], or null.
/// \param[in]  coupling                 [num_columns, num_columns]; read above the diagonal.
/// \param[in]  num_columns              0 to QLORA_MAX_ROUND_COLUMNS.
/// \param[out] rounded, change          [num_columns, rows]; neither may be one of the others.
/// Units of the CPU form: rows of the weight.
QLORA_API qlora_status qlora_round_columns_nf4_cpu(const float* values, const float* scales, const float* inverse,
                                                   const float* coupling, const float* previous, int64_t num_columns,
                                                   int64_t rows, float* rounded, float* change, int64_t row_begin,
                                                   int64_t row_end);
QLORA_API qlora_status qlora_round_columns_nf4_cuda(const float* values, const float* scales, const float* inverse,
                                                    const float* coupling, const float* previous, int64_t num_columns,
                                                    int64_t rows, float* rounded, float* change, int32_t device,
                                                    qlora_stream stream);

// ---------------------------------------------------------------------------------------------------------------------
// Linear: y = x W^T + bias, and its input gradient dx = dy W. Sums, with the bias among them, are fp32, rounded once
// to `dtype`. W is the dequantised weight: in fp32 on CPU; on CUDA rounded to `dtype`, or, in kernels for few rows, the
// code values rounded to `dtype` and the scales applied in fp32; in one for a bf16 gradient of few rows code values,
// scales and dy times them are rounded to fp16. The relative error is at most that of the rounded weight.

/// \param[in]  x     [m, cols] of `dtype`, contiguous.
/// \param[in]  bias  [rows] of `dtype`, or null.
/// \param[out] y     [m, rows] of `dtype`, contiguous.
/// Units of the CPU form: rows of the weight (columns of y).
QLORA_API qlora_status qlora_linear_4bit_cpu(const void* x, int64_t m, qlora_dtype dtype,
                                             const qlora_weight_4bit* weight, const void* bias, void* y,
                                             int64_t row_begin, int64_t row_end);
/// \param[in] workspace       `workspace_size` bytes of device memory, 256-byte aligned; null if the size is 0.
/// \param[in] workspace_size  At least what qlora_linear_4bit_workspace_size returned for the same problem.
QLORA_API qlora_status qlora_linear_4bit_cuda(const void* x, int64_t m, qlora_dtype dtype,
                                              const qlora_weight_4bit* weight, const void* bias, void* y,
                                              void* workspace, int64_t workspace_size, int32_t device,
                                              qlora_stream stream);
QLORA_API qlora_status qlora_linear_4bit_workspace_size(const qlora_weight_4bit* weight, int64_t m, qlora_dtype dtype,
                                                        int is_grad, int has_bias, int32_t device, int64_t* size);

/// A group: ys[i] = x weights[i]^T + biases[i] for weights that share x, in one launch where a kernel can. The members'
/// sums may be split over k otherwise than in qlora_linear_4bit_cuda, hence differ from its in their rounding.
/// \param[in]  x        [m, cols] of `dtype`, contiguous.
/// \param[in]  weights  [count], each of the same cols.
/// \param[in]  count    At least 1.
/// \param[in]  biases   [count] pointers on the host, each to [rows of its weight] of `dtype` or null; null: no biases.
/// \param[out] ys       [count] pointers on the host, each to [m, rows of its weight] of `dtype`, contiguous, none
///                      overlapping another.
/// \param[in] workspace, workspace_size  As for qlora_linear_4bit_cuda, of the size of the function below.
QLORA_API qlora_status qlora_linear_4bit_group_cuda(const void* x, int64_t m, qlora_dtype dtype,
                                                    const qlora_weight_4bit* weights, int64_t count,
                                                    const void* const* biases, void* const* ys, void* workspace,
                                                    int64_t workspace_size, int32_t device, qlora_stream stream);
/// \param[in]  biases  As above; only which of them are null is read.
/// \param[out] size    Bytes.
QLORA_API qlora_status qlora_linear_4bit_group_workspace_size(const qlora_weight_4bit* weights, int64_t count,
                                                              int64_t m, qlora_dtype dtype, const void* const* biases,
                                                              int32_t device, int64_t* size);

/// Writes "one launch by <kernel>" or "one after the other: <reason>", then for each weight what
/// qlora_explain_linear_4bit says of it. Parameters as there.
QLORA_API qlora_status qlora_explain_linear_4bit_group(const qlora_weight_4bit* weights, int64_t count, int64_t m,
                                                       qlora_dtype dtype, int32_t device, char* text, int64_t size);

/// \param[in]  dy  [m, rows] of `dtype`, contiguous.
/// \param[out] dx  [m, cols] of `dtype`, contiguous.
/// Units of the CPU form: columns of the weight (columns of dx).
QLORA_API qlora_status qlora_linear_4bit_grad_input_cpu(const void* dy, int64_t m, qlora_dtype dtype,
                                                        const qlora_weight_4bit* weight, void* dx, int64_t col_begin,
                                                        int64_t col_end);
QLORA_API qlora_status qlora_linear_4bit_grad_input_cuda(const void* dy, int64_t m, qlora_dtype dtype,
                                                         const qlora_weight_4bit* weight, void* dx, void* workspace,
                                                         int64_t workspace_size, int32_t device, qlora_stream stream);

// ---------------------------------------------------------------------------------------------------------------------
// Linear with a LoRA adapter. Forward:
//   left = scaling x' A^T                       [m, rank]
//   y    = x W^T + bias + left B^T              [m, n]
// Backward:
//   dleft = scaling dy B                        [m, rank]
//   dx    = dy W + dleft A                      [m, k]   without dleft A where x' is another tensor than x;
//   dx'   = dleft A                             [m, k]   then this is the gradient of x'
//   dA    = dleft^T x'                          [rank, k]
//   dB    = dy^T left                           [n, rank]
// x' is what the adapter reads: x itself, or a dropout of it. Sums are fp32, each result is rounded once; on CUDA y and
// dx are rounded once before their update and once after it, unless the linear kernel adds the update to its own sums.
// left and dleft are matrices of `dtype` whose rows are left_columns = rank rounded up to a multiple of 64 values long;
// those from `rank` on are zeros.

/// \param[in]  x          [m, k] of `dtype`, contiguous.
/// \param[in]  adapter_x  x' [m, k]; null: x.
/// \param[in]  bias       [n] of `dtype`, or null.
/// \param[out] y          [m, n] of `dtype`, contiguous.
/// \param[out] left       [m, left_columns] of `dtype`, aligned to 16 bytes.
/// \param[in]  workspace  As for qlora_linear_4bit_cuda; its size from qlora_lora_linear_4bit_workspace_size.
QLORA_API qlora_status qlora_lora_linear_4bit_cuda(const void* x, const void* adapter_x, int64_t m, qlora_dtype dtype,
                                                   const qlora_weight_4bit* weight, const void* bias,
                                                   const qlora_lora* lora, void* y, void* left, void* workspace,
                                                   int64_t workspace_size, int32_t device, qlora_stream stream);

/// \param[in]  dy             [m, n] of `dtype`, contiguous.
/// \param[in]  adapter_x      x' [m, k] of `dtype`, contiguous; read for da alone.
/// \param[in]  left           As the forward pass wrote it; read for db alone.
/// \param[in]  is_x_separate  Whether x' is another tensor than x.
/// \param[out] dx             [m, k] of `dtype`, or null.
/// \param[out] dadapter_x     [m, k] of `dtype`, or null; null where x' is x.
/// \param[out] da             [rank, k] of lora->a_dtype, or null.
/// \param[out] db             [n, rank] of lora->b_dtype, or null.
QLORA_API qlora_status qlora_lora_linear_4bit_backward_cuda(const void* dy, const void* adapter_x, const void* left,
                                                            int64_t m, qlora_dtype dtype,
                                                            const qlora_weight_4bit* weight, const qlora_lora* lora,
                                                            int is_x_separate, void* dx, void* dadapter_x, void* da,
                                                            void* db, void* workspace, int64_t workspace_size,
                                                            int32_t device, qlora_stream stream);

/// The larger of what qlora_linear_4bit_workspace_size says for the product with W and of at most 32 MiB for the
/// adapter's sums; in the backward pass dleft besides, m * left_columns values of `dtype`.
/// \param[in]  lora  Only rank is read.
QLORA_API qlora_status qlora_lora_linear_4bit_workspace_size(const qlora_weight_4bit* weight, int64_t m,
                                                             qlora_dtype dtype, const qlora_lora* lora, int is_backward,
                                                             int has_bias, int32_t device, int64_t* size);

/// On CPU the same in steps, each over units of its own, for the caller to run in parallel: adapter_product for left or
/// dleft, then lora_linear_4bit or lora_linear_4bit_backward, then adapter_gradient.
///
/// output = scaling input R [depth, cols], with zeros from column `cols` on: left (R = A^T), dleft (R = B) and dx'
/// (R = A, with a scaling of 1).
/// \param[in]  input   [m, depth] of `dtype`, its rows input_stride values apart.
/// \param[in]  right   R, or with is_right_transposed R^T [cols, depth]; of right_dtype.
/// \param[out] output  [m, output_stride] of `dtype`.
/// Units: rows of the output.
QLORA_API qlora_status qlora_adapter_product_cpu(const void* input, int64_t input_stride, int64_t m, int64_t depth,
                                                 qlora_dtype dtype, const void* right, qlora_dtype right_dtype,
                                                 int is_right_transposed, float scaling, void* output,
                                                 int64_t output_stride, int64_t cols, int64_t row_begin,
                                                 int64_t row_end);
/// y = x W^T + bias + left B^T. Only b, b_dtype and rank of `lora` are read. Units: rows of the weight.
QLORA_API qlora_status qlora_lora_linear_4bit_cpu(const void* x, int64_t m, qlora_dtype dtype,
                                                  const qlora_weight_4bit* weight, const void* bias,
                                                  const qlora_lora* lora, const void* left, void* y, int64_t row_begin,
                                                  int64_t row_end);
/// The step of the backward pass that reads the weight: dx = dy W + dleft A. Only a, a_dtype and rank of `lora` are
/// read. Units: columns of the weight.
QLORA_API qlora_status qlora_lora_linear_4bit_backward_cpu(const void* dy, int64_t m, qlora_dtype dtype,
                                                           const qlora_weight_4bit* weight, const qlora_lora* lora,
                                                           const void* dleft, void* dx, int64_t col_begin,
                                                           int64_t col_end);
/// output [rank, cols] = left^T x, or with is_output_transposed [cols, rank]: dA of dleft and x', dB of left and dy.
/// \param[in]  left    [m, left_columns] of `dtype`.
/// \param[in]  x       [m, cols] of `dtype`.
/// \param[out] output  Of output_dtype.
/// Units: columns of x.
QLORA_API qlora_status qlora_adapter_gradient_cpu(const void* left, int64_t rank, const void* x, int64_t m,
                                                  int64_t cols, qlora_dtype dtype, void* output,
                                                  qlora_dtype output_dtype, int is_output_transposed, int64_t col_begin,
                                                  int64_t col_end);

/// Embedding: y[i, :] = dequantised row indices[i] of the weight.
/// \param[in]  indices  [num_indices], each in [0, rows). CPU: an index outside is QLORA_INVALID_ARGUMENT. CUDA: its
/// row
///                      of y is filled with NaN, since the check would need a synchronisation.
/// \param[out] y        [num_indices, cols] of `dtype`.
/// Units of the CPU form: indices.
QLORA_API qlora_status qlora_embedding_4bit_cpu(const int64_t* indices, int64_t num_indices,
                                                const qlora_weight_4bit* weight, void* y, qlora_dtype dtype,
                                                int64_t begin, int64_t end);
QLORA_API qlora_status qlora_embedding_4bit_cuda(const int64_t* indices, int64_t num_indices,
                                                 const qlora_weight_4bit* weight, void* y, qlora_dtype dtype,
                                                 int32_t device, qlora_stream stream);

#ifdef __cplusplus
}  // extern "C"
#endif
