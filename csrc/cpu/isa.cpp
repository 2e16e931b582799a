// SPDX-License-Identifier: Apache-2.0
// Which instruction sets this processor has, and their kernels.
#include "isa.h"

#if defined(PEFTKERN_AMX) && defined(__linux__) && !defined(PEFTKERN_EMULATED_TILES)
#define PEFTKERN_ASK_FOR_AMX 1
#else
#define PEFTKERN_ASK_FOR_AMX 0
#endif

#if PEFTKERN_ASK_FOR_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__) && !defined(PEFTKERN_PORTABLE_ONLY)
#define PEFTKERN_X86 1
#else
#define PEFTKERN_X86 0
#endif
#if defined(__aarch64__) && defined(__linux__) && !defined(PEFTKERN_PORTABLE_ONLY)
#define PEFTKERN_ARM64 1
#include <sys/auxv.h>
#include <sys/prctl.h>
#else
#define PEFTKERN_ARM64 0
#endif

namespace peftkern {
namespace {

#if PEFTKERN_ASK_FOR_AMX
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
#elif defined(PEFTKERN_EMULATED_TILES)
[[maybe_unused]] bool has_amx() { return true; }
#else
[[maybe_unused]] bool has_amx() { return false; }
#endif

}  // namespace

bool has_isa(int isa) {
#if PEFTKERN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case PEFTKERN_ISA_AVX2: return avx2;
    case PEFTKERN_ISA_AVX512: return avx512;
    case PEFTKERN_ISA_AVX512_BF16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case PEFTKERN_ISA_AMX_BF16: return avx512 && __builtin_cpu_supports("avx512bf16") && has_amx();
  }
#elif PEFTKERN_ARM64
  constexpr unsigned long kSve = 1ul << 22, kFp16 = 1ul << 10, kBf16 = 1ul << 14;  // HWCAP_SVE, _ASIMDHP, HWCAP2_BF16
  constexpr int kGetVectorLength = 51, kLengthMask = 0xffff;                       // PR_SVE_GET_VL
  switch (isa) {
    case PEFTKERN_ISA_SVE256: return (getauxval(AT_HWCAP) & kSve) && (prctl(kGetVectorLength) & kLengthMask) == 32;
    case PEFTKERN_ISA_NEON_BF16: return (getauxval(AT_HWCAP) & kFp16) && (getauxval(AT_HWCAP2) & kBf16);
  }
#endif
  return isa == PEFTKERN_ISA_PORTABLE;
}

namespace {

// For floats.
constexpr int kFastestFirst[] = {PEFTKERN_ISA_AVX512, PEFTKERN_ISA_AVX2, PEFTKERN_ISA_SVE256};

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
  if (dtype == PEFTKERN_BFLOAT16 && has_isa(PEFTKERN_ISA_NEON_BF16)) return PEFTKERN_ISA_NEON_BF16;
  for (int isa : kFastestFirst)
    if (has_isa(isa)) return isa;
  return PEFTKERN_ISA_PORTABLE;
}

#define PEFTKERN_KERNELS(isa) {isa::attention_forward, isa::attention_backward}
Kernels kernels_of(int isa) {
  switch (isa) {
#if PEFTKERN_X86
    case PEFTKERN_ISA_AVX2: return PEFTKERN_KERNELS(avx2);
    case PEFTKERN_ISA_AVX512: return PEFTKERN_KERNELS(avx512);
    case PEFTKERN_ISA_AVX512_BF16: return PEFTKERN_KERNELS(avx512_bf16);
#if defined(PEFTKERN_AMX)
    case PEFTKERN_ISA_AMX_BF16: return PEFTKERN_KERNELS(amx_bf16);
#endif
#elif PEFTKERN_ARM64
    case PEFTKERN_ISA_SVE256: return PEFTKERN_KERNELS(sve256);
    case PEFTKERN_ISA_NEON_BF16: return PEFTKERN_KERNELS(neon_bf16);
#endif
  }
  return PEFTKERN_KERNELS(portable);
}
#undef PEFTKERN_KERNELS

}  // namespace peftkern
