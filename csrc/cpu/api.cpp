// SPDX-License-Identifier: Apache-2.0
// The entry points of the C ABI: check a call, choose an instruction set, plan the call, run it.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "isa.h"
#include "philox.h"
#include "planner.h"

namespace peftkern {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Scratch {
  std::unique_ptr<void, Free> data;
  size_t size = 0;
};
thread_local Scratch scratch;

constexpr size_t kKeptScratch = size_t(256) << 20;  // bytes; larger scratch memory is freed after the call

bool valid(const peftkern_attention& a) {
  const bool known = a.dtype >= PEFTKERN_FLOAT32 && a.dtype <= PEFTKERN_BFLOAT16 &&
                     a.prefix_dtype >= PEFTKERN_FLOAT32 && a.prefix_dtype <= PEFTKERN_BFLOAT16;
  const bool sizes = a.batch >= 0 && a.q_len >= 0 && a.kv_len >= 0 && a.prefix_len >= 0 && a.num_kv_heads > 0 &&
                     a.num_heads > 0 && a.num_heads % a.num_kv_heads == 0 && a.head_dim >= 0 &&
                     a.head_dim <= kMaxHeadDim && a.value_dim >= 0 && a.value_dim <= kMaxHeadDim &&
                     a.kv_len < INT32_MAX && a.prefix_len < INT32_MAX;
  return known && sizes && a.window >= 0 && a.dropout_p >= 0.0 && a.dropout_p < 1.0;
}

// Checks the offsets and indices that memory accesses depend on.
bool valid_indices(const peftkern_attention& a) {
  const int64_t count = a.cu_seqlens ? a.num_sequences : a.batch;
  if (a.cu_seqlens) {
    int64_t last = 0;
    for (int64_t i = 0; i <= count; i++) {
      const int64_t offset = read_index(a.cu_seqlens, a.cu_seqlens_dtype, i);
      if (offset < last || offset > a.q_len) return false;
      last = offset;
    }
  }
  for (int64_t i = 0; a.prefix_ids && i < count; i++) {
    const int64_t id = read_index(a.prefix_ids, a.prefix_ids_dtype, i);
    if (id < -1 || id >= a.bank_size) return false;
  }
  for (int64_t i = 0; a.prefix_lens && i < a.bank_size; i++) {
    const int64_t length = read_index(a.prefix_lens, a.prefix_lens_dtype, i);
    if (length < 0 || length > a.prefix_len) return false;
  }
  for (int64_t i = 0; a.prefix_rows && i < a.bank_size; i++) {
    const int64_t length = a.prefix_lens ? read_index(a.prefix_lens, a.prefix_lens_dtype, i) : a.prefix_len;
    for (int64_t j = 0; j < length; j++) {
      const int64_t* at = a.prefix_rows + 2 * (i * a.prefix_len + j);
      if (at[0] < -1 || at[0] >= a.source_size) return false;
      if (at[1] < 0 || at[1] >= (at[0] < 0 ? a.kv_len : a.source_len)) return false;
    }
  }
  return true;
}

int choose_isa(int64_t requested, int64_t dtype) {
  if (requested == PEFTKERN_ISA_AUTO) return default_isa(int(dtype));
  return requested <= PEFTKERN_ISA_NEON_BF16 && has_isa(int(requested)) ? int(requested) : -1;
}

// Checks a call and runs `body(kernels, planner)`.
template <typename Body>
int run(const peftkern_attention& args, const Body& body) try {
  if (!valid(args) || !valid_indices(args)) return PEFTKERN_INVALID_ARGUMENT;
  const int isa = choose_isa(args.isa, args.dtype);
  if (isa < 0) return PEFTKERN_UNSUPPORTED_ISA;
  Planner planner(args);
  const int status = body(kernels_of(isa), planner);
  if (scratch.size > kKeptScratch) scratch = {};
  return status;
} catch (const std::bad_alloc&) {
  return PEFTKERN_OUT_OF_MEMORY;
}

}  // namespace

void* acquire_scratch(size_t bytes) {
  bytes = std::max<size_t>((bytes + 4095) / 4096 * 4096, 4096);
  if (bytes > scratch.size) {
    scratch = {};
    scratch.data.reset(std::aligned_alloc(4096, bytes));
    scratch.size = scratch.data ? bytes : 0;
  }
  return scratch.data.get();
}

}  // namespace peftkern

using namespace peftkern;

// peftkern/native/abi.py relies on structs of eight-byte fields without padding.
static_assert(sizeof(peftkern_attention) == 69 * 8 && sizeof(peftkern_attention_backward) == 101 * 8);
static_assert(sizeof(peftkern_embedding) == 23 * 8 && sizeof(peftkern_embedding_backward) == 28 * 8);

extern "C" {

int peftkern_abi_version(void) { return PEFTKERN_ABI_VERSION; }

const char* peftkern_error_string(int status) {
  switch (status) {
    case PEFTKERN_OK: return "ok";
    case PEFTKERN_INVALID_ARGUMENT: return "a size, dtype, offset or index out of range";
    case PEFTKERN_UNSUPPORTED_ISA: return "this processor lacks the requested instruction set";
    case PEFTKERN_OUT_OF_MEMORY: return "out of memory";
  }
  return "unknown status";
}

int peftkern_isa_available(int isa) { return has_isa(isa); }

const char* peftkern_isa_name(int isa) {
  static const char* const names[] = {"auto",        "portable", "avx2",   "avx512",
                                      "avx512_bf16", "amx_bf16", "sve256", "neon_bf16"};
  return isa >= 0 && isa <= PEFTKERN_ISA_NEON_BF16 ? names[isa] : nullptr;
}

int peftkern_isa_default(int dtype) { return default_isa(dtype); }

int peftkern_prefix_attention(const peftkern_attention* args) {
  if (!args) return PEFTKERN_INVALID_ARGUMENT;
  return run(*args,
             [&](const Kernels& kernels, Planner& planner) { return kernels.forward(*args, planner.forward(*args)); });
}

int peftkern_prefix_attention_backward(const peftkern_attention_backward* args) {
  if (!args) return PEFTKERN_INVALID_ARGUMENT;
  return run(args->forward, [&](const Kernels& kernels, Planner& planner) {
    return kernels.backward(*args, planner.backward(args->forward));
  });
}

void peftkern_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t words[4][1];
  plain::philox4x32<1>(counter, counter + 1, counter + 2, counter[3], key, words);
  for (int i = 0; i < 4; i++) out[i] = words[i][0];
}

}  // extern "C"
