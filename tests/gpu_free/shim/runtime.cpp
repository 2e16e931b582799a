// SPDX-License-Identifier: Apache-2.0
// The runtime of the host shim: fibers, scheduler, shadow memory. Built without -fsanitize=thread; the kernels are built
// with it, so that g++ calls __tsan_read and __tsan_write at every access. Those are defined here and libtsan is not linked.
#include "runtime.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#error "the host shim switches stacks in x86-64 assembly"
#endif

// Saves the callee-saved registers, swaps the stack pointer, restores: the whole context switch (System V).
extern "C" void shim_switch(void** save, void* to);
asm(R"(
.text
.globl shim_switch
.hidden shim_switch
shim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace shim {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kMaxThreads = 1024, kWarp = 32, kSharedBytes = 228 << 10;
constexpr int kSeveral = 0xffff;

enum class State { kRunnable, kAtBarrier, kInCollective, kDone };

// A cp.async under way: its bytes are read when it is issued and land when it is waited for.
struct Copy {
  uint32_t target;
  unsigned char bytes[16];
};

struct Fiber {
  void* stack_pointer;
  Thread thread;
  State state;
  int line;  // of the barrier it waits at
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  uint32_t warp_barriers;
};

struct Rendezvous {
  uint32_t arrived;
  const char* name;
  void* records[kWarp];
};

// The last accesses to one byte of shared memory: threads count from 1, kSeveral stands for more than one reader.
struct SharedByte {
  uint16_t writer, reader;
  uint32_t writer_epoch, reader_epoch, writer_warp_barriers, reader_warp_barriers;
  bool initialised;
};

// The last accesses to two bytes of global memory, within the present launch. Blocks count from 1.
struct GlobalWord {
  uint32_t launch, writer_block, reader_block, writer_epoch;
  uint16_t writer;
  bool initialised;
};

struct Buffer {
  uintptr_t begin, end;
  bool writable;
  std::string name;
  std::vector<GlobalWord> words;
};

Fiber fibers[kMaxThreads];
Rendezvous rendezvous[kMaxThreads / kWarp];
SharedByte shadow[kSharedBytes];
unsigned char *stacks, *shared;
void* scheduler;
uintptr_t module_begin, module_end;
int threads_of_block, shared_bytes, running_fiber;
uint32_t epoch, launch_number, block_number;
bool running, preemptive;
std::mt19937 random_numbers;
std::string failure;
std::vector<Buffer> buffers;
std::map<std::pair<int, const void*>, size_t> shared_limits;  // of kernels, by device
void (*kernel_of_launch)(const void*);
const void* parameters_of_launch;

// Executes launches in place of the fibers; false if a check failed.
using Launcher = int (*)(int64_t kernel, const unsigned* grid, int threads, int shared_bytes, const void* parameters,
                         int64_t parameter_bytes);
Launcher launcher;

// A launch of the past. The kernel is an offset in its library.
struct Record {
  int64_t kernel, x, y, z, threads, shared_bytes, device;
};
std::vector<Record> records;

void yield() { shim_switch(&fibers[running_fiber].stack_pointer, scheduler); }

void end_fiber() {
  fibers[running_fiber].state = State::kDone;
  yield();
  __builtin_unreachable();
}

void start_fiber() {
  kernel_of_launch(parameters_of_launch);
  const Fiber& fiber = fibers[running_fiber];
  for (const auto& group : fiber.groups)
    if (!group.empty()) fail("the thread ends while a cp.async is under way");
  if (!fiber.open.empty()) fail("the thread ends with a cp.async that it has not committed");
  end_fiber();
}

// Ordered: a block barrier lies between, or it is the same thread, or the same warp with a warp barrier since.
bool ordered(uint16_t thread, uint32_t access_epoch, uint32_t warp_barriers) {
  if (!thread || access_epoch != epoch || thread == running_fiber + 1) return true;
  return thread != kSeveral && (thread - 1) / kWarp == running_fiber / kWarp &&
         warp_barriers < fibers[running_fiber].warp_barriers;
}

void global_access(uintptr_t address, int bytes, bool write) {
  (write ? counters.stored : counters.loaded) += bytes;
  const uint32_t block = block_number + 1;
  const uint16_t thread = (uint16_t)(running_fiber + 1);
  for (Buffer& b : buffers) {
    if (address < b.begin || address + bytes > b.end) continue;
    if (address % bytes) fail("misaligned access of %d bytes at %s+%ld", bytes, b.name.c_str(), long(address - b.begin));
    if (write && !b.writable) fail("write to the read-only buffer %s", b.name.c_str());
    for (uintptr_t i = (address - b.begin) / 2; i < (address - b.begin + bytes + 1) / 2; i++) {
      GlobalWord& w = b.words[i];
      if (!write && !w.initialised) fail("read of uninitialised global memory at %s+%ld", b.name.c_str(), long(2 * i));
      if (!b.writable) continue;
      if (w.launch != launch_number) w = {launch_number, 0, 0, 0, 0, w.initialised};
      const bool others = (w.writer_block && w.writer_block != block) ||
                          (w.writer_block == block && w.writer != thread && w.writer_epoch == epoch);
      if (others || (write && w.reader_block && w.reader_block != block))
        fail("global-memory race at %s+%ld: %s by block %u, %s by block %u", b.name.c_str(), long(2 * i),
             write ? "write" : "read", block - 1, others ? "written" : "read", (others ? w.writer_block : w.reader_block) - 1);
      if (write) {
        w.writer_block = block, w.writer = thread, w.writer_epoch = epoch, w.initialised = true;
      } else {
        w.reader_block = block;
      }
    }
    return;
  }
  const char* nearest = "?";
  long distance = 0;
  for (const Buffer& b : buffers)
    if (address + 65536 >= b.begin && address < b.end + 65536) nearest = b.name.c_str(), distance = long(address - b.begin);
  fail("global memory out of bounds: %s of %d bytes at %s%+ld", write ? "write" : "read", bytes, nearest, distance);
}

// Every load and store that the compiler sees.
void access(void* pointer, int bytes, bool write) {
  if (!running) return;
  const uintptr_t address = (uintptr_t)pointer;
  if (address - (uintptr_t)stacks < kStackBytes * kMaxThreads) return;  // locals
  if (address - (uintptr_t)shared < kSharedBytes) {
    if (preemptive && random_numbers() % 8 == 0) yield();
    shared_access((uint32_t)(address - (uintptr_t)shared), bytes, write);
  } else if (address < module_begin || address >= module_end) {
    global_access(address, bytes, write);
  }
}

void allocate() {
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const auto& header = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr, end = begin + header.p_memsz, here = (uintptr_t)&fibers;
          if (header.p_type != PT_LOAD || !(header.p_flags & PF_W) || here < begin || here >= end) continue;
          module_begin = begin, module_end = end;
          return 1;
        }
        return 0;
      },
      nullptr);
  const auto map = [](size_t bytes) {
    return (unsigned char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  };
  stacks = map(kStackBytes * kMaxThreads);
  shared = map(kSharedBytes);
}

void start_block(Index block, Index grid) {
  memset(shared, 0xff, shared_bytes);
  memset(shadow, 0, sizeof(SharedByte) * shared_bytes);
  epoch++;
  for (auto& r : rendezvous) r.arrived = 0;
  for (int i = 0; i < threads_of_block; i++) {
    Fiber& fiber = fibers[i];
    fiber.state = State::kRunnable;
    fiber.open.clear();
    fiber.groups.clear();
    fiber.warp_barriers = 0;
    fiber.thread = {{(unsigned)i, 0, 0}, block, grid, i % kWarp, i / kWarp};
    void** top = (void**)(stacks + kStackBytes * (i + 1));
    *--top = nullptr;
    *--top = (void*)start_fiber;
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    fiber.stack_pointer = top;
  }
}

// Lets all threads of a block pass its barrier, or says why they cannot.
bool release_barrier(int waiting, int done) {
  if (waiting + done < threads_of_block) {
    failure = "deadlock: " + std::to_string(waiting) + " threads at a barrier, others in a warp instruction";
    return false;
  }
  if (done) {
    failure = "a barrier waits for threads that have ended";
    return false;
  }
  for (int i = 1; i < threads_of_block; i++)
    if (fibers[i].line != fibers[0].line) {
      failure = "divergent barrier: lines " + std::to_string(fibers[0].line) + " and " + std::to_string(fibers[i].line);
      return false;
    }
  epoch++;
  for (int i = 0; i < threads_of_block; i++) fibers[i].state = State::kRunnable;
  return true;
}

bool run_block() {
  std::vector<int> runnable;
  while (true) {
    int done = 0, waiting = 0;
    runnable.clear();
    for (int i = 0; i < threads_of_block; i++) {
      if (fibers[i].state == State::kRunnable) runnable.push_back(i);
      done += fibers[i].state == State::kDone;
      waiting += fibers[i].state == State::kAtBarrier;
    }
    if (runnable.empty()) {
      if (done == threads_of_block) return true;
      if (!release_barrier(waiting, done)) return false;
      continue;
    }
    std::shuffle(runnable.begin(), runnable.end(), random_numbers);
    for (int i : runnable) {
      if (fibers[i].state != State::kRunnable) continue;
      running_fiber = i;
      current = &fibers[i].thread;
      shim_switch(&scheduler, fibers[i].stack_pointer);
      if (!failure.empty()) return false;
    }
  }
}

}  // namespace

Thread* current;
Counters counters;
int device;

size_t& shared_limit(const void* kernel) { return shared_limits.try_emplace({device, kernel}, 48 << 10).first->second; }

unsigned char* shared_memory() { return shared; }
const char* message() { return failure.c_str(); }

void fail(const char* format, ...) {
  char text[512], place[128];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  snprintf(place, sizeof place, " [block %u, %u, thread %d]", current->block.x, current->block.y, running_fiber);
  failure = std::string(text) + place;
  end_fiber();
  __builtin_unreachable();
}

void block_barrier(int line) {
  fibers[running_fiber].state = State::kAtBarrier;
  fibers[running_fiber].line = line;
  yield();
}

void warp_collective(const char* name, void* record, void (*compute)(void**)) {
  Rendezvous& r = rendezvous[current->warp];
  if (r.arrived && strcmp(r.name, name)) fail("warp divergence: %s meets %s", name, r.name);
  r.name = name;
  r.records[current->lane] = record;
  r.arrived |= 1u << current->lane;
  if (r.arrived != 0xffffffffu) {
    fibers[running_fiber].state = State::kInCollective;
    yield();
    return;
  }
  compute(r.records);
  r.arrived = 0;
  for (int lane = 0; lane < kWarp; lane++)
    if (lane != current->lane) fibers[current->warp * kWarp + lane].state = State::kRunnable;
}

void warp_barrier() {
  warp_collective("__syncwarp", nullptr, [](void**) {});
  fibers[running_fiber].warp_barriers++;
}

void shared_access(uint32_t offset, int bytes, bool write) {
  if (offset + bytes > (uint32_t)shared_bytes)
    fail("shared memory out of bounds: offset %u, %d bytes, of %d", offset, bytes, shared_bytes);
  if (offset % bytes) fail("misaligned access of %d bytes at offset %u of shared memory", bytes, offset);
  const uint16_t thread = (uint16_t)(running_fiber + 1);
  const uint32_t warp_barriers = fibers[running_fiber].warp_barriers;
  for (uint32_t i = offset; i < offset + bytes; i++) {
    SharedByte& s = shadow[i];
    if (!ordered(s.writer, s.writer_epoch, s.writer_warp_barriers))
      fail("shared-memory race at offset %u: %s, written by thread %d with no barrier between", i, write ? "write" : "read",
           s.writer - 1);
    if (write && !ordered(s.reader, s.reader_epoch, s.reader_warp_barriers))
      fail("shared-memory race at offset %u: write, read before by thread %d with no barrier between", i,
           s.reader == kSeveral ? -1 : s.reader - 1);
    if (!write && !s.initialised) fail("read of uninitialised shared memory at offset %u", i);
    if (write) {
      s.writer = thread, s.writer_epoch = epoch, s.writer_warp_barriers = warp_barriers, s.initialised = true;
    } else if (s.reader && s.reader != thread && s.reader_epoch == epoch) {
      s.reader = kSeveral;
    } else {
      s.reader = thread, s.reader_epoch = epoch, s.reader_warp_barriers = warp_barriers;
    }
  }
}

void copy_async(uint32_t target, const void* source, bool valid) {
  Copy copy{target, {}};
  if ((uintptr_t)source % 16) fail("cp.async: the source is not 16-byte aligned");
  if (valid) {
    global_access((uintptr_t)source, 16, false);
    memcpy(copy.bytes, source, 16);
  }
  shared_access(target, 16, true);
  memset(shared + target, 0xff, 16);  // NaN until it is waited for
  for (int i = 0; i < 16; i++) shadow[target + i].initialised = false;
  fibers[running_fiber].open.push_back(copy);
}

void copy_async_commit() {
  Fiber& fiber = fibers[running_fiber];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void copy_async_wait(int pending) {
  auto& groups = fibers[running_fiber].groups;
  while ((int)groups.size() > pending) {
    for (const Copy& copy : groups.front()) {
      shared_access(copy.target, 16, true);
      memcpy(shared + copy.target, copy.bytes, 16);
    }
    groups.erase(groups.begin());
  }
}

bool launch(const Launch& launch) {
  const Index grid = launch.grid;
  failure.clear();
  Dl_info module;
  dladdr(launch.kernel, &module);
  const int64_t kernel = (const char*)launch.kernel - (const char*)module.dli_fbase;
  records.push_back({kernel, grid.x, grid.y, grid.z, launch.threads, launch.shared_bytes, device});
  if (launcher) {
    const unsigned sizes[] = {grid.x, grid.y, grid.z};
    if (launcher(kernel, sizes, launch.threads, launch.shared_bytes, launch.parameters, launch.parameter_bytes)) return true;
    failure = "the launcher failed";
    return false;
  }
  if (!stacks) allocate();
  if (launch.threads % kWarp || launch.threads > kMaxThreads || launch.shared_bytes > kSharedBytes) {
    failure = "launch: too many threads or too much shared memory";
    return false;
  }
  threads_of_block = launch.threads, shared_bytes = launch.shared_bytes;
  kernel_of_launch = launch.run, parameters_of_launch = launch.parameters;
  launch_number++;
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  for (unsigned i = 0; i < order.size(); i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_numbers);
  for (unsigned i : order) {
    block_number = i;
    start_block({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y}, grid);
    running = true;
    const bool passed = run_block();
    running = false;
    if (!passed) return false;
  }
  return true;
}

}  // namespace shim

extern "C" {

#define SHIM_EXPORT __attribute__((visibility("default")))

// Forgets all buffers and counts; `seed` orders threads and blocks, `preempt` also switches threads at shared accesses.
SHIM_EXPORT void shim_reset(unsigned seed, int preempt) {
  shim::random_numbers.seed(seed);
  shim::preemptive = preempt;
  shim::buffers.clear();
  shim::counters = {};
  shim::records.clear();
}
// Memory that kernels may read and, if `writable`, write. `initialised`: whether it holds values yet.
SHIM_EXPORT void shim_register(const void* begin, int64_t bytes, int writable, int initialised, const char* name) {
  const uintptr_t address = (uintptr_t)begin;
  shim::GlobalWord word{};
  word.initialised = initialised;
  shim::buffers.push_back({address, address + bytes, writable != 0, name, std::vector<shim::GlobalWord>((bytes + 1) / 2, word)});
}
SHIM_EXPORT void shim_set_launcher(shim::Launcher launcher) { shim::launcher = launcher; }
SHIM_EXPORT const char* shim_message() { return shim::failure.c_str(); }
SHIM_EXPORT void shim_counters(int64_t out[3]) { memcpy(out, &shim::counters, sizeof shim::counters); }
// The number of launches since the last reset; writes the fields of the first `count` to `out`.
SHIM_EXPORT int64_t shim_launches(int64_t* out, int64_t count) {
  memcpy(out, shim::records.data(), count * sizeof(shim::Record));
  return (int64_t)shim::records.size();
}
SHIM_EXPORT int shim_device() { return shim::device; }
SHIM_EXPORT void shim_set_device(int device) { shim::device = device; }

// What -fsanitize=thread calls.
#define SHIM_HOOK(bytes)                                                                        \
  void __tsan_read##bytes(void* p) { shim::access(p, bytes, false); }                           \
  void __tsan_write##bytes(void* p) { shim::access(p, bytes, true); }                           \
  void __tsan_unaligned_read##bytes(void* p) { shim::access(p, bytes, false); }                 \
  void __tsan_unaligned_write##bytes(void* p) { shim::access(p, bytes, true); }
SHIM_HOOK(1)
SHIM_HOOK(2)
SHIM_HOOK(4)
SHIM_HOOK(8)
SHIM_HOOK(16)
void __tsan_read_range(void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 4) shim::access((char*)p + i, 4, false);
}
void __tsan_write_range(void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 4) shim::access((char*)p + i, 4, true);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void* __tsan_memcpy(void* target, const void* source, size_t bytes) { return memcpy(target, source, bytes); }
void* __tsan_memset(void* target, int value, size_t bytes) { return memset(target, value, bytes); }
}
