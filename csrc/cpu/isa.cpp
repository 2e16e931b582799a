// SPDX-License-Identifier: Apache-2.0
// Which instruction sets this processor has, and their kernels.
#include "isa.h"

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
namespace {

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

}  // namespace

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

namespace {

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

}  // namespace

int default_isa(int dtype) {
  if (dtype == PEFTKERN_BFLOAT16 && has_isa(PEFTKERN_ISA_AMX_BF16)) return PEFTKERN_ISA_AMX_BF16;
  if (dtype == PEFTKERN_BFLOAT16 && has_fast_bf16()) return PEFTKERN_ISA_AVX512_BF16;
  if (has_isa(PEFTKERN_ISA_AVX512)) return PEFTKERN_ISA_AVX512;
  return has_isa(PEFTKERN_ISA_AVX2) ? PEFTKERN_ISA_AVX2 : PEFTKERN_ISA_PORTABLE;
}

#define PEFTKERN_KERNELS(isa) {isa::attention_forward, isa::attention_backward}
Kernels kernels_of(int isa) {
  static const Kernels kernels[] = {
      {nullptr, nullptr},         PEFTKERN_KERNELS(portable),
#if PEFTKERN_X86
      PEFTKERN_KERNELS(avx2),     PEFTKERN_KERNELS(avx512),   PEFTKERN_KERNELS(avx512_bf16),
#if defined(PEFTKERN_AMX)
      PEFTKERN_KERNELS(amx_bf16),
#endif
#endif
  };
  return kernels[isa];
}

}  // namespace peftkern
