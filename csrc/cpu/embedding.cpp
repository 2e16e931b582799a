// SPDX-License-Identifier: Apache-2.0
// [prompt | weight[input_ids]] in one pass, and the gradients of prompt and weight.
#include <omp.h>

#include <cstring>

#define PEFTKERN_ISA plain
#define PEFTKERN_LANES 4
#include "plan.h"
#include "dtypes.h"

using namespace peftkern;
using namespace peftkern::plain;

namespace {

bool valid(const peftkern_embedding& a) {
  if (a.dtype < PEFTKERN_FLOAT32 || a.dtype > PEFTKERN_BFLOAT16 || a.batch < 0 || a.seq_len < 0) return false;
  for (int64_t b = 0; b < a.batch; b++) {
    for (int64_t s = 0; s < a.seq_len; s++) {
      const int64_t id =
          read_index(a.input_ids, a.input_ids_dtype, b * a.input_ids_stride[0] + s * a.input_ids_stride[1]);
      if (id < 0 || id >= a.vocab_size) return false;
    }
    if (a.prompt_ids) {
      const int64_t id = read_index(a.prompt_ids, a.prompt_ids_dtype, b);
      if (id < 0 || id >= a.bank_size) return false;
    }
  }
  return true;
}

int64_t prompt_of(const peftkern_embedding& a, int64_t sample) {
  return a.prompt_ids ? read_index(a.prompt_ids, a.prompt_ids_dtype, sample) : 0;
}

int64_t token_of(const peftkern_embedding& a, int64_t b, int64_t s) {
  return read_index(a.input_ids, a.input_ids_dtype, b * a.input_ids_stride[0] + s * a.input_ids_stride[1]);
}

// row += dout[b, position, begin:end]
void add_row(const peftkern_embedding_backward& g, int64_t b, int64_t position, int64_t begin, int64_t end,
             float* row) {
  const int64_t dtype = g.forward.dtype;
  const char* source = offset(g.dout, dtype, b * g.dout_stride[0] + position * g.dout_stride[1]);
  int64_t e = begin;
  for (; e + kLanes <= end; e += kLanes) {
    const char* at = offset(source, dtype, e);
    const vf x = dtype == PEFTKERN_FLOAT32   ? load_lanes<PEFTKERN_FLOAT32>(at, kLanes)
                 : dtype == PEFTKERN_FLOAT16 ? load_lanes<PEFTKERN_FLOAT16>(at, kLanes)
                                             : load_lanes<PEFTKERN_BFLOAT16>(at, kLanes);
    store(row + e, load(row + e) + x);
  }
  for (; e < end; e++) row[e] += load_scalar(source, dtype, e);
}

}  // namespace

extern "C" {

int peftkern_soft_prompt_embedding(const peftkern_embedding* args) {
  if (!args || !valid(*args)) return PEFTKERN_INVALID_ARGUMENT;
  const peftkern_embedding& a = *args;
  const int64_t length = a.prompt_len + a.seq_len, size = a.dtype == PEFTKERN_FLOAT32 ? 4 : 2;
#pragma omp parallel for num_threads((int)max(1, a.num_threads)) schedule(static)
  for (int64_t i = 0; i < a.batch * length; i++) {
    const int64_t b = i / length, position = i % length;
    char* out = static_cast<char*>(a.out) + i * a.dim * size;
    if (position >= a.prompt_len) {
      const int64_t token = token_of(a, b, position - a.prompt_len);
      memcpy(out, offset(a.weight, a.dtype, token * a.weight_stride[0]), a.dim * size);
      continue;
    }
    const int64_t at = prompt_of(a, b) * a.prompt_stride[0] + position * a.prompt_stride[1];
    const char* row = offset(a.prompt, a.prompt_dtype, at);
    if (a.prompt_dtype == a.dtype) {
      memcpy(out, row, a.dim * size);  // FAULT: prompt-read-past-its-end
      continue;
    }
    const float* values = reinterpret_cast<const float*>(row);  // an fp32 prompt beside half-precision weights
    if (a.dtype == PEFTKERN_BFLOAT16) {
      const int64_t whole = a.dim / kLanes * kLanes;
      for (int64_t e = 0; e < whole; e += kLanes) store_lanes<PEFTKERN_BFLOAT16>(out + 2 * e, load(values + e), kLanes);
      if (whole < a.dim)
        store_lanes<PEFTKERN_BFLOAT16>(out + 2 * whole, load_lanes<PEFTKERN_FLOAT32>(values + whole, a.dim - whole),
                                       a.dim - whole);
    } else {
      for (int64_t e = 0; e < a.dim; e++) reinterpret_cast<uint16_t*>(out)[e] = float_to_half(values[e]);
    }
  }
  return PEFTKERN_OK;
}

int peftkern_soft_prompt_embedding_backward(const peftkern_embedding_backward* args) {
  if (!args || !valid(args->forward)) return PEFTKERN_INVALID_ARGUMENT;
  const peftkern_embedding_backward& g = *args;
  const peftkern_embedding& a = g.forward;
#pragma omp parallel num_threads((int)max(1, a.num_threads))
  {
    if (g.dprompt) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < a.bank_size * a.prompt_len; i++) {
        float* row = g.dprompt + i * a.dim;
        memset(row, 0, sizeof(float) * a.dim);
        for (int64_t b = 0; b < a.batch; b++)
          if (prompt_of(a, b) == i / a.prompt_len) add_row(g, b, i % a.prompt_len, 0, a.dim, row);
      }
    }
    if (g.dweight) {
      // Each thread owns a range of columns and adds the tokens in their order.
      const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
      const int64_t begin = a.dim * thread / threads, end = a.dim * (thread + 1) / threads;
      for (int64_t v = 0; v < a.vocab_size; v++)
        memset(g.dweight + v * a.dim + begin, 0, sizeof(float) * (end - begin));
      for (int64_t b = 0; b < a.batch; b++)
        for (int64_t s = 0; s < a.seq_len; s++)
          add_row(g, b, a.prompt_len + s, begin, end, g.dweight + token_of(a, b, s) * a.dim);
    }
  }
  return PEFTKERN_OK;
}

}  // extern "C"
