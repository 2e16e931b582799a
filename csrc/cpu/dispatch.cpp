// SPDX-License-Identifier: Apache-2.0
// The C entry points: they check arguments, choose an instruction set and plan the call.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "philox.h"
#include "plan.h"

#if defined(PEFTKERN_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__) && !defined(PEFTKERN_PORTABLE_ONLY)
#define PEFTKERN_X86 1
#else
#define PEFTKERN_X86 0
#endif

namespace peftkern {

int64_t read_index(const void* data, int64_t dtype, int64_t i) {
  return dtype == PEFTKERN_INT32 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
}

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Scratch {
  std::unique_ptr<void, Free> data;
  size_t size = 0;
};
thread_local Scratch scratch;

constexpr int64_t kDecodeRows = 32;  // positions x heads of a group up to which a call is a decode

constexpr int64_t kMaxPartials = int64_t(256) << 20;  // bytes of partial sums of one sequence

constexpr size_t kKeptScratch = size_t(256) << 20;  // bytes; larger scratch memory is freed after the call

// Makes the plan of one call. Owns the arrays that the plan points to.
struct Planner {
  Plan plan{};
  std::vector<Sequence> sequences;
  std::vector<Unit> units;
  std::vector<Group> groups;

  explicit Planner(const peftkern_attention& a) {
    const bool packed = a.cu_seqlens != nullptr;
    const int64_t count = packed ? a.num_sequences : a.batch;
    for (int64_t i = 0; i < count; i++) {
      Sequence s{packed ? 0 : i, 0, a.q_len, a.kv_len, 0, a.prefix_len};
      if (packed) {
        s.start = read_index(a.cu_seqlens, a.cu_seqlens_dtype, i);
        s.q_len = s.kv_len = read_index(a.cu_seqlens, a.cu_seqlens_dtype, i + 1) - s.start;
      }
      if (a.prefix_ids) s.prefix = read_index(a.prefix_ids, a.prefix_ids_dtype, i);
      if (s.prefix < 0) s.prefix_len = 0;
      if (a.prefix_lens && s.prefix >= 0) s.prefix_len = read_index(a.prefix_lens, a.prefix_lens_dtype, s.prefix);
      if (s.prefix_len == 0) s.prefix = -1;
      sequences.push_back(s);
    }
    plan.group_size = a.num_heads / a.num_kv_heads;
    plan.heads_per_block = std::min<int64_t>(plan.group_size, kBlockM);
    plan.positions_per_block = kBlockM / plan.heads_per_block;
    for (const Sequence& s : sequences) {
      plan.max_kv_len = std::max(plan.max_kv_len, s.kv_len);
      plan.max_prefix_len = std::max(plan.max_prefix_len, s.prefix_len);
    }
  }

  int64_t blocks(const Sequence& s) const {
    return (s.q_len + plan.positions_per_block - 1) / plan.positions_per_block;
  }

  // The approximate time that a sequence takes, for one kv head.
  double work(const Sequence& s) const { return double(s.q_len) * (double(s.kv_len) / 2 + double(s.prefix_len) + 1); }

  void add_units(int32_t sequence, int64_t splits) {
    splits = std::max<int64_t>(1, std::min(splits, blocks(sequences[sequence])));
    for (int64_t split = 0; split < splits; split++)
      units.push_back({sequence, int32_t(split), int32_t(splits), int32_t(plan.num_partials + split)});
    if (splits > 1) plan.num_partials += int32_t(splits);
  }

  double total_work() const {
    double total = 1;
    for (const Sequence& s : sequences) total += work(s);
    return total;
  }

  // Rows do not depend on each other, so the number of threads may decide how they are cut.
  const Plan& forward(const peftkern_attention& a) {
    // The rows of several samples are ordered by position only if no window distinguishes them.
    const bool ordered = a.q_len == 1 || !a.window || !a.prefix_in_window;
    if (a.q_len * plan.group_size <= kDecodeRows && ordered && !a.cu_seqlens && !a.gate && a.dropout_p == 0.0)
      return decode();
    std::vector<int32_t> order(sequences.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t x, int32_t y) { return work(sequences[x]) > work(sequences[y]); });
    const double share = total_work() * double(a.num_kv_heads) / (4.0 * double(std::max<int64_t>(1, a.num_threads)));
    for (int32_t i : order) {
      const bool alone = a.num_threads <= 1;
      add_units(i, alone ? 1 : int64_t(work(sequences[i]) / share) + 1);
    }
    return finish();
  }

  // One unit per sequence, one group per prefix.
  const Plan& decode() {
    plan.decode = true;
    std::vector<int32_t> order(sequences.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t x, int32_t y) { return sequences[x].prefix < sequences[y].prefix; });
    for (int32_t i : order) {
      if (groups.empty() || groups.back().prefix != sequences[i].prefix)
        groups.push_back({int32_t(units.size()), 0, sequences[i].prefix});
      groups.back().count++;
      add_units(i, 1);
    }
    return finish();
  }

  // Sums over rows follow the cut: a function of sizes and ids only.
  const Plan& backward(const peftkern_attention& a) {
    constexpr double kTasks = 24;
    std::vector<int32_t> order(sequences.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) {
      const Sequence &s = sequences[x], &t = sequences[y];
      return s.prefix != t.prefix ? s.prefix < t.prefix : work(s) > work(t);
    });
    const double share = total_work() * double(a.num_kv_heads) / kTasks;
    double filled = 0;
    for (int32_t i : order) {
      const int64_t bytes =  // dk and dv of a split
          4 * (sequences[i].kv_len + 1) * (a.head_dim + a.value_dim + 2) * a.num_kv_heads;
      const int64_t splits = std::min<int64_t>({int64_t(work(sequences[i]) / share) + 1, 8, kMaxPartials / bytes});
      const int32_t first = int32_t(units.size());
      add_units(i, splits > 1 && blocks(sequences[i]) >= 2 * splits ? splits : 1);
      for (int32_t unit = first; unit < int32_t(units.size()); unit++) {
        const double size = work(sequences[i]) / units[unit].splits;
        if (groups.empty() || groups.back().prefix != sequences[i].prefix || filled + size > 1.25 * share) {
          groups.push_back({unit, 0, sequences[i].prefix});
          filled = 0;
        }
        groups.back().count++;
        filled += size;
      }
    }
    return finish();
  }

  const Plan& finish() {
    plan.num_sequences = int32_t(sequences.size());
    plan.num_units = int32_t(units.size());
    plan.num_groups = int32_t(groups.size());
    plan.sequences = sequences.data();
    plan.units = units.data();
    plan.groups = groups.data();
    return plan;
  }
};

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

#if defined(PEFTKERN_AMX) && defined(__linux__)
// Whether the processor has AMX, the kernel saves its tiles, and this process may use them. Linux requires an explicit
// permission request.
bool request_amx() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx >> 22 & 1) || !(edx >> 24 & 1)) return false;                                  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(1, 0, &eax, &ebx, &ecx, &edx) || !(ecx >> 27 & 1)) return false;  // OSXSAVE
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (eax & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

[[maybe_unused]] bool has_amx() {
  static const bool granted = request_amx();
  return granted;
}
#else
[[maybe_unused]] bool has_amx() { return false; }
#endif

bool has_isa(int isa) {
#if PEFTKERN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case PEFTKERN_ISA_AVX2: return avx2;
    case PEFTKERN_ISA_AVX512: return avx512;
    case PEFTKERN_ISA_AVX512_BF16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case PEFTKERN_ISA_AMX_BF16: return avx512 && __builtin_cpu_supports("avx512bf16") && has_amx();
  }
#endif
  return isa == PEFTKERN_ISA_PORTABLE;
}

// Whether a multiply-add of bf16 pairs is as fast as one of floats. It is on AMD's cores; on Intel's it takes four
// times as long.
bool has_fast_bf16() {
#if PEFTKERN_X86
  __builtin_cpu_init();
  return has_isa(PEFTKERN_ISA_AVX512_BF16) && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

int choose_isa(int64_t requested, int64_t dtype) {
  if (requested == PEFTKERN_ISA_AUTO) return peftkern_isa_default(int(dtype));
  return requested <= PEFTKERN_ISA_AMX_BF16 && has_isa(int(requested)) ? int(requested) : -1;
}

// A nested type is not deduced, so that null can be passed as a kernel.
template <typename Args>
struct KernelOf {
  typedef int (*type)(const Args&, const Plan&);
};
template <typename Args>
using Kernel = typename KernelOf<Args>::type;

template <typename Args>
int run(const Args& args, int isa, const Plan& plan, Kernel<Args> portable_kernel, Kernel<Args> avx2_kernel,
        Kernel<Args> avx512_kernel, Kernel<Args> avx512_bf16_kernel, Kernel<Args> amx_bf16_kernel) {
  const Kernel<Args> kernels[] = {nullptr,       portable_kernel,    avx2_kernel,
                                  avx512_kernel, avx512_bf16_kernel, amx_bf16_kernel};
  const int status = kernels[isa](args, plan);
  if (scratch.size > kKeptScratch) scratch = {};
  return status;
}

#if PEFTKERN_X86 && defined(PEFTKERN_AMX)
#define PEFTKERN_KERNELS(name) portable::name, avx2::name, avx512::name, avx512_bf16::name, amx_bf16::name
#elif PEFTKERN_X86
#define PEFTKERN_KERNELS(name) portable::name, avx2::name, avx512::name, avx512_bf16::name, nullptr
#else
#define PEFTKERN_KERNELS(name) portable::name, nullptr, nullptr, nullptr, nullptr
#endif

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
  static const char* const names[] = {"auto", "portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
  return isa >= 0 && isa <= PEFTKERN_ISA_AMX_BF16 ? names[isa] : nullptr;
}

int peftkern_isa_default(int dtype) {
  if (dtype == PEFTKERN_BFLOAT16 && has_isa(PEFTKERN_ISA_AMX_BF16)) return PEFTKERN_ISA_AMX_BF16;
  if (dtype == PEFTKERN_BFLOAT16 && has_fast_bf16()) return PEFTKERN_ISA_AVX512_BF16;
  for (int isa : {PEFTKERN_ISA_AVX512, PEFTKERN_ISA_AVX2})
    if (has_isa(isa)) return isa;
  return PEFTKERN_ISA_PORTABLE;
}

int peftkern_prefix_attention(const peftkern_attention* args) try {
  if (!args || !valid(*args) || !valid_indices(*args)) return PEFTKERN_INVALID_ARGUMENT;
  const int isa = choose_isa(args->isa, args->dtype);
  if (isa < 0) return PEFTKERN_UNSUPPORTED_ISA;
  Planner planner(*args);
  return run(*args, isa, planner.forward(*args), PEFTKERN_KERNELS(attention_forward));
} catch (const std::bad_alloc&) {
  return PEFTKERN_OUT_OF_MEMORY;
}

int peftkern_prefix_attention_backward(const peftkern_attention_backward* args) try {
  if (!args || !valid(args->forward) || !valid_indices(args->forward)) return PEFTKERN_INVALID_ARGUMENT;
  const int isa = choose_isa(args->forward.isa, args->forward.dtype);
  if (isa < 0) return PEFTKERN_UNSUPPORTED_ISA;
  Planner planner(args->forward);
  return run(*args, isa, planner.backward(args->forward), PEFTKERN_KERNELS(attention_backward));
} catch (const std::bad_alloc&) {
  return PEFTKERN_OUT_OF_MEMORY;
}

void peftkern_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t words[4][1];
  plain::philox4x32<1>(counter, counter + 1, counter + 2, counter[3], key, words);
  for (int i = 0; i < 4; i++) out[i] = words[i][0];
}

}  // extern "C"
