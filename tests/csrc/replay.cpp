// SPDX-License-Identifier: Apache-2.0
// Replays calls of the C ABI that calls.py has written, without Python or torch: for sanitizers, which want a program of
// their own, and for processors that are not here.
//
//   replay CALLS ISA THREADS...     ISA: a name, or `all` that this processor has
//
// Every tensor gets an allocation of its own, not a byte longer than its last element. Outputs start as NaN. They must be
// the expected ones within the tolerance that CALLS carries, and bitwise equal for every number of threads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/peftkern.h"

namespace {

using Bytes = std::vector<char>;

struct Tensor {
  int64_t word;   // of the struct: where its address goes
  int64_t dtype;  // peftkern_dtype of an output; -1: an input
  double tolerance;
  Bytes data;  // the input, or what is expected
};

struct Call {
  std::string name;
  int64_t op;
  std::vector<int64_t> words;
  std::vector<Tensor> tensors;
};

class Reader {
 public:
  explicit Reader(const char* path) : file(std::fopen(path, "rb")) {
    if (!file) fail(path);
  }
  ~Reader() { std::fclose(file); }

  template <typename T>
  T take() {
    T x;
    read(&x, sizeof x);
    return x;
  }
  template <typename V>
  V take_all() {
    V x(size_t(take<int64_t>()), typename V::value_type());
    read(x.data(), x.size() * sizeof(typename V::value_type));
    return x;
  }

 private:
  void read(void* to, size_t size) {
    if (size && std::fread(to, size, 1, file) != 1) fail("unexpected end of file");
  }
  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "replay: %s\n", what);
    std::exit(2);
  }
  std::FILE* file;
};

std::vector<Call> read_calls(const char* path) {
  Reader in(path);
  std::vector<Call> calls(size_t(in.take<int64_t>()));
  for (Call& call : calls) {
    call.name = in.take_all<std::string>();
    call.op = in.take<int64_t>();
    call.words = in.take_all<std::vector<int64_t>>();
    call.tensors.resize(size_t(in.take<int64_t>()));
    for (Tensor& x : call.tensors) {
      x.word = in.take<int64_t>();
      x.dtype = in.take<int64_t>();
      x.tolerance = in.take<double>();
      x.data = in.take_all<Bytes>();
    }
  }
  return calls;
}

int run(int64_t op, void* args, int64_t isa, int64_t num_threads) {
  const auto set = [&](peftkern_attention& a) { a.isa = isa, a.num_threads = num_threads; };
  switch (op) {
    case 0: {
      auto* a = static_cast<peftkern_attention*>(args);
      set(*a);
      return peftkern_prefix_attention(a);
    }
    case 1: {
      auto* a = static_cast<peftkern_attention_backward*>(args);
      set(a->forward);
      return peftkern_prefix_attention_backward(a);
    }
    case 2: {
      auto* a = static_cast<peftkern_embedding*>(args);
      a->num_threads = num_threads;
      return peftkern_soft_prompt_embedding(a);
    }
    default: {
      auto* a = static_cast<peftkern_embedding_backward*>(args);
      a->forward.num_threads = num_threads;
      return peftkern_soft_prompt_embedding_backward(a);
    }
  }
}

float element(const char* data, int64_t dtype, size_t i) {
  if (dtype == PEFTKERN_FLOAT32) {
    float x;
    std::memcpy(&x, data + 4 * i, 4);
    return x;
  }
  uint16_t half;
  std::memcpy(&half, data + 2 * i, 2);
  if (dtype == PEFTKERN_BFLOAT16) {
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const int exponent = (half >> 10) & 31, fraction = half & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(float(fraction), -24)
                                          : std::ldexp(float(1024 + fraction), exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

// Whether an output is right; says what is not.
bool compare(const Call& call, const char* isa, int64_t threads, const Tensor& expected, const char* got) {
  const size_t count = expected.data.size() / (expected.dtype == PEFTKERN_FLOAT32 ? 4 : 2);
  for (size_t i = 0; i < count; i++) {
    const float x = element(got, expected.dtype, i), y = element(expected.data.data(), expected.dtype, i);
    if (x == y || std::fabs(double(x) - double(y)) <= expected.tolerance) continue;
    std::fprintf(stderr, "%s, %s, %d threads: output at word %d, element %zu is %g, expected %g within %g\n",
                 call.name.c_str(), isa, int(threads), int(expected.word), i, x, y, expected.tolerance);
    return false;
  }
  return true;
}

// The caller's tiles, configured as by no kernel of ours, or released: `kept` says whether a call left them so.
class ForeignTiles {
 public:
#if defined(PEFTKERN_AMX)
  ForeignTiles(int isa, bool configured) : used_(isa == PEFTKERN_ISA_AMX_BF16) {
    if (!used_) return;
    if (configured) {
      given_[0] = 1;  // the palette
      given_[16] = 12;  // bytes and rows of the first tile
      given_[48] = 5;
      asm volatile("ldtilecfg %0" ::"m"(given_));
    } else {
      asm volatile("tilerelease" ::: "memory");
    }
  }
  bool kept() const {
    if (!used_) return true;
    alignas(64) unsigned char now[64];
    asm volatile("sttilecfg %0" : "=m"(now));
    asm volatile("tilerelease" ::: "memory");
    return !std::memcmp(now, given_, sizeof now);
  }

 private:
  alignas(64) unsigned char given_[64] = {};
  bool used_;
#else
  ForeignTiles(int, bool) {}
  bool kept() const { return true; }
#endif
};

bool replay(const Call& call, int isa, const std::vector<int64_t>& thread_counts) {
  std::vector<std::unique_ptr<char[]>> first;
  for (const int64_t threads : thread_counts) {
    std::vector<int64_t> words = call.words;
    std::vector<std::unique_ptr<char[]>> memory;
    for (const Tensor& x : call.tensors) {
      memory.emplace_back(new char[x.data.size()]);
      if (x.dtype < 0)
        std::memcpy(memory.back().get(), x.data.data(), x.data.size());
      else
        std::memset(memory.back().get(), 0xff, x.data.size());  // NaN in every dtype
      words[size_t(x.word)] = reinterpret_cast<int64_t>(memory.back().get());
    }
    const ForeignTiles tiles(isa, first.empty());
    const int status = run(call.op, words.data(), isa, threads);
    if (!tiles.kept()) {
      std::fprintf(stderr, "%s, %s: the caller's tiles are configured otherwise\n", call.name.c_str(),
                   peftkern_isa_name(isa));
      return false;
    }
    if (status != PEFTKERN_OK) {
      std::fprintf(stderr, "%s, %s: %s\n", call.name.c_str(), peftkern_isa_name(isa), peftkern_error_string(status));
      return false;
    }
    for (size_t i = 0; i < memory.size(); i++) {
      const Tensor& x = call.tensors[i];
      if (x.dtype >= 0 && !compare(call, peftkern_isa_name(isa), threads, x, memory[i].get())) return false;
      if (x.dtype >= 0 && !first.empty() && std::memcmp(first[i].get(), memory[i].get(), x.data.size())) {
        std::fprintf(stderr, "%s, %s: output at word %d differs between %d and %d threads\n", call.name.c_str(),
                     peftkern_isa_name(isa), int(x.word), int(thread_counts[0]), int(threads));
        return false;
      }
    }
    if (first.empty()) first = std::move(memory);
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: replay CALLS ISA THREADS...\n");
    return 2;
  }
  std::vector<int64_t> threads;
  for (int i = 3; i < argc; i++) threads.push_back(std::atoi(argv[i]));
  const std::vector<Call> calls = read_calls(argv[1]);
  int passed = 0, failed = 0;
  for (int isa = PEFTKERN_ISA_PORTABLE; const char* name = peftkern_isa_name(isa); isa++) {
    if (!peftkern_isa_available(isa) || (std::strcmp(argv[2], "all") && std::strcmp(argv[2], name))) continue;
    for (const Call& call : calls) (replay(call, isa, threads) ? passed : failed)++;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed || !passed;
}
