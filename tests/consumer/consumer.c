/* Quantises a small weight, multiplies with it and prints what came: "packed", "absmax", "y" and "error" lines. */
#include <stdio.h>
#include <stdlib.h>

#include "qlora/qlora.h"

enum { kRows = 4, kCols = 64, kValues = kRows * kCols, kBlockSize = 64 };

static void check(qlora_status status) {
  if (status == QLORA_OK) return;
  fprintf(stderr, "status %d: %s\n", (int)status, qlora_last_error());
  exit(1);
}

int main(void) {
  float weight[kValues];
  float x[kCols];
  float y[kRows];
  uint8_t packed[kValues / 2];
  float absmax[kValues / kBlockSize];
  qlora_weight_4bit quantised = {0};
  int i;

  for (i = 0; i < kValues; ++i) weight[i] = (float)((i * 37) % 101 - 50) / 50.0f;
  for (i = 0; i < kCols; ++i) x[i] = (float)(i % 5 - 2);

  check(qlora_quantize_4bit_cpu(weight, QLORA_FLOAT32, kValues, kBlockSize, QLORA_NF4, packed, absmax, 0,
                                kValues / kBlockSize));
  quantised.packed = packed;
  quantised.absmax = absmax;
  quantised.rows = kRows;
  quantised.cols = kCols;
  quantised.block_size = kBlockSize;
  quantised.format = QLORA_NF4;
  check(qlora_linear_4bit_cpu(x, 1, QLORA_FLOAT32, &quantised, NULL, y, 0, kRows));

  printf("version %s\n", qlora_version());
  printf("packed");
  for (i = 0; i < kValues / 2; ++i) printf(" %d", packed[i]);
  printf("\nabsmax");
  for (i = 0; i < kValues / kBlockSize; ++i) printf(" %.9g", absmax[i]);
  printf("\ny");
  for (i = 0; i < kRows; ++i) printf(" %.9g", y[i]);

  if (qlora_quantize_4bit_cpu(weight, QLORA_FLOAT32, kValues, 48, QLORA_NF4, packed, absmax, 0, 1) !=
      QLORA_INVALID_ARGUMENT) {
    fprintf(stderr, "a block size of 48 was taken\n");
    return 1;
  }
  printf("\nerror %s\n", qlora_last_error());
  return 0;
}
