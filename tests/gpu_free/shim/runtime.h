// SPDX-License-Identifier: Apache-2.0
// Runs device code on a CPU: a fiber per thread of a block, warp instructions by rendezvous, checks on every access.
#ifndef PEFTKERN_SHIM_RUNTIME_H_
#define PEFTKERN_SHIM_RUNTIME_H_

#include <cstddef>
#include <cstdint>

namespace shim {

struct Index {
  unsigned x, y, z;
};
struct Thread {
  Index thread, block, grid;
  int lane, warp;
};
extern Thread* current;

// What the last launches did, in bytes of global memory and in warp instructions.
struct Counters {
  int64_t loaded, stored, mma;
};
extern Counters counters;

// The current device.
extern int device;
// How much shared memory a kernel may have on the current device: 48 KB, if not set otherwise.
size_t& shared_limit(const void* kernel);

unsigned char* shared_memory();
void block_barrier(int line);
void warp_barrier();
// Each lane leaves a record; the last of the 32 to arrive runs `compute` on them all.
void warp_collective(const char* name, void* record, void (*compute)(void** records));
void copy_async(uint32_t target, const void* source, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);
// An access to shared memory that the compiler does not see.
void shared_access(uint32_t offset, int bytes, bool write);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Launch {
  Index grid;
  int threads, shared_bytes;
  void (*run)(const void* parameters);
  const void* parameters;
  int64_t parameter_bytes;
  const void* kernel;  // its address, for who executes it by another way
};

// Runs a grid, block after block in random order. False if a check failed.
bool launch(const Launch& launch);

// What the check that failed says.
const char* message();

}  // namespace shim
#endif  // PEFTKERN_SHIM_RUNTIME_H_
