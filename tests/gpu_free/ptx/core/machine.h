// SPDX-License-Identifier: Apache-2.0
// The state of a block in flight: warps with their registers, shared memory, global memory, and what was counted.
#pragma once
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using Mask = u32;  // a bit for each lane of a warp

constexpr int kLanes = 32;
constexpr Mask kFullWarp = ~Mask{0};

struct Machine;
struct Warp;
struct Instruction;
using Handler = void (*)(Machine&, Warp&, const Instruction&, Mask);

// Control flow is the scheduler's; everything else has a handler.
enum Control : int { kPlain, kBranch, kExit, kBarrier };

// Operands are registers by index; -1 is the sink `_`. A constant is a register that nobody writes.
struct Instruction {
  Handler run = nullptr;
  Control control = kPlain;
  bool is_wgmma = false, is_copy = false;
  bool guard_negated = false;
  s32 guard = -1;
  const s32* dst = nullptr;
  const s32* src = nullptr;
  s32 n_dst = 0, n_src = 0;
  s64 offset[2] = {0, 0};  // immediate offsets of the memory operands, in order
  s32 target = 0;          // of a branch: index of an instruction
  s32 line = 0;            // in the PTX text
};

// What a GPU would do wrong in silence.
struct Violation {
  std::string message;
};

// A happens-before clock: entry a is the last step of agent a that is known to have been made.
using Clock = std::vector<u32>;

inline void join(Clock& into, const Clock& other) {
  for (size_t i = 0; i < into.size(); i++)
    if (other[i] > into[i])
      into[i] = other[i];
}

// ---- memory

// How one agent accesses shared memory. Warps are agents 0 .. n - 1; the asynchronous units follow.
struct Accessor {
  int agent;
  u32 step;
  const Clock* seen;
};

// Shared memory with, for each byte, whether it holds a value and who wrote and read it when. Two accesses by different
// agents, one a write, are ordered only if the later agent's clock has seen the earlier one's step.
class SharedMemory {
 public:
  enum State : u8 { kUnwritten, kInFlight, kWritten };

  void reset(size_t size, int agents);
  void read(void* into, u32 address, u32 size, const Accessor& by);
  void write(const void* from, u32 address, u32 size, const Accessor& by);
  // The target of an asynchronous copy: until `land` nobody may touch it.
  void launch(u32 address, u32 size, const Accessor& by);
  void land(const void* from, u32 address, u32 size, const Accessor& by);
  // Written through the generic proxy, and is no fence known that lets the asynchronous proxy see it?
  void require_fenced(u32 address, u32 size, const Clock& fenced, int warps) const;
  void begin_store() { store_++; }

  u64 bytes_read = 0, bytes_written = 0;
  // Bytes where lanes of one store disagree, so that any of their values may stay. No fault: of a sum over lanes, by
  // shuffles with the first product fused into its addition, each lane has another rounding.
  u64 conflicts = 0;

 private:
  void check_range(u32 address, u32 size, const char* what) const;
  void check_writer(u32 address, u32 size, const Accessor& by, const char* what, const u8* same) const;
  void check_readers(u32 address, u32 size, const Accessor& by) const;
  std::string name(int agent) const;

  size_t size_ = 0;
  int agents_ = 0;
  u64 store_ = 0;
  std::vector<u8> bytes_, state_, writer_;
  std::vector<u32> written_;            // step of the last write
  std::vector<std::vector<u32>> read_;  // per agent: step of the last read since the last write
  std::vector<u64> stored_by_;          // number of the store instruction
};

struct Buffer {
  u64 begin, end;
  const u8* allowed;  // a byte for each byte, 0 in the gaps of a strided tensor; null where there are none
  bool read_only;
  std::string name;
  u64 loaded = 0, stored = 0;
};

// The launch's tensors. Blocks of one launch run in no order on a GPU: what one stores no other may touch.
class GlobalMemory {
 public:
  std::vector<Buffer> buffers;

  void begin_launch() { pages_.clear(), last_page_ = nullptr; }
  // Lanes of one instruction that load from the same address share a transaction, which is counted once.
  void begin_load() { loaded_by_instruction_.clear(); }
  void load(void* into, u64 address, u32 size, u32 block);
  void store(const void* from, u64 address, u32 size, u32 block);
  // For atomic operations: any block may come.
  u8* atomic(u64 address, u32 size);

 private:
  struct Page {
    u32 writer[256] = {}, reader[256] = {};  // block + 1, or kSeveral
  };
  static constexpr u32 kSeveral = ~u32{0};

  Buffer& find(u64 address, u32 size, const char* what);
  Page& page(u64 address);

  std::vector<u64> loaded_by_instruction_;
  std::map<u64, Page> pages_;
  Page* last_page_ = nullptr;
  u64 last_key_ = 0;
  size_t last_buffer_ = 0;
};

// ---- warps

struct Copy {  // one cp.async of one lane
  u32 address, size;
  u8 data[16];
};

struct WgmmaGroup {
  std::vector<s32> accumulators, operands;  // registers
  u32 step;
};

enum WarpState { kRunning, kAtBarrier, kExited };

struct Warp {
  int index = 0;
  WarpState state = kRunning;
  Mask live = kFullWarp;
  s32 pc[kLanes] = {};
  std::vector<u64> registers;  // [register][lane]
  Clock seen;                  // what happened before
  Clock fenced;                // what of it a proxy fence has made visible to the asynchronous proxy
  u32 barrier = 0, barrier_threads = 0;
  s32 barrier_line = 0;
  bool yields = false;  // it polled in vain: let others run

  std::vector<Copy> open_copies;               // issued, not committed
  std::deque<std::vector<Copy>> copy_groups;   // committed, not waited for

  // wgmma, see wgmma.h
  std::vector<s32> open_accumulators, open_operands;  // of what is not committed
  std::deque<WgmmaGroup> wgmma_groups;                // committed, not waited for
  u32 wgmma_step = 1;                                 // of this warp's asynchronous agent
  u64 clock = 0, wgmma_fence = 0;                     // instructions executed; at the last wgmma.fence
  std::vector<u64> written_at;                        // per register
  std::vector<u8> accumulating, multiplying;          // per register: by how many wgmma it is in use

  u32 open_bulk_step = 0;  // of bulk stores, see bulk.h
  std::deque<u32> bulk_groups;

  u64* reg(s32 r) { return &registers[size_t(r) * kLanes]; }
};

struct Counters {
  u64 instructions = 0, mma = 0, async_copies = 0;
};

struct MBarrier {
  u32 expected = 0, pending = 0, phase = 0;
  s64 transactions = 0;
  Clock released, released_fenced;  // of the arrivals so far
  Clock acquired, acquired_fenced;  // by who waits for the last completed phase
};

// A bulk copy by the tensor memory accelerator, somewhere between its issue and its completion.
struct BulkPiece {
  u32 address, size;
  u8 data[16];
};
struct BulkCopy {
  u32 barrier = 0, step = 0, bytes = 0;
  std::vector<BulkPiece> pieces;
};

// What the host writes into a tensor map; dim 0 is the contiguous one. Strides are bytes.
struct TensorMap {
  u64 base;
  s64 rank, element, swizzle;  // swizzle: 0 none, 1 to 3 for 32, 64, 128 bytes
  s64 size[5], stride[5], box[5];
};

struct Machine {
  std::vector<Instruction> program;
  std::vector<s32> operands;
  std::vector<Warp> warps;
  SharedMemory shared;
  GlobalMemory global;
  Counters counters;
  std::map<u32, MBarrier> mbarriers;
  std::vector<BulkCopy> bulk_copies;
  std::vector<TensorMap> tensor_maps;
  u32 bulk_step = 1;
  std::mt19937 random;
  bool has_wgmma = false;
  int running = 0;  // the warp whose turn it is
  u32 block[3] = {}, grid[3] = {}, block_index = 0;

  int agents() const { return 2 * int(warps.size()) + 1; }  // warps, their tensor cores, the bulk copies
  int wgmma_agent(const Warp& w) const { return int(warps.size()) + w.index; }
  int bulk_agent() const { return 2 * int(warps.size()); }
  Accessor accessor(const Warp& w) const { return {w.index, w.seen[w.index], &w.seen}; }
};

// What a warp did so far becomes known with its clock; what it does next does not.
inline void release(Warp& w) { w.seen[w.index]++; }

// ---- handlers for operations of each lane by itself

template <class F>
inline void for_lanes(Mask mask, F body) {
  if (mask == kFullWarp)
    for (int lane = 0; lane < kLanes; lane++)
      body(lane);
  else
    for (int lane = 0; lane < kLanes; lane++)
      if (mask >> lane & 1)
        body(lane);
}

struct Half {
  u16 bits;
};
struct BFloat {
  u16 bits;
};

template <class T>
inline T from_slot(u64 slot) {
  if constexpr (std::is_same_v<T, bool>) {
    return slot & 1;
  } else {
    T value;
    memcpy(&value, &slot, sizeof(T));
    return value;
  }
}
template <class T>
inline u64 to_slot(T value) {
  u64 slot = 0;
  memcpy(&slot, &value, sizeof(T));
  return slot;
}

template <auto Operation, class Class, class Result, class... Args, size_t... I>
inline void apply(Warp& w, const Instruction& in, Mask mask, Result (Class::*)(Args...) const,
                  std::index_sequence<I...>) {
  u64* dst = w.reg(in.dst[0]);
  const u64* src[sizeof...(Args)] = {w.reg(in.src[I])...};
  for_lanes(mask, [&](int lane) { dst[lane] = to_slot<Result>(Operation(from_slot<Args>(src[I][lane])...)); });
}
template <class Class, class Result, class... Args>
std::index_sequence_for<Args...> indices_of(Result (Class::*)(Args...) const);

// The lambda's own types say how the operands are read and the result is written.
template <auto Operation>
void lanewise(Machine&, Warp& w, const Instruction& in, Mask mask) {
  constexpr auto call = &decltype(Operation)::operator();
  apply<Operation>(w, in, mask, call, decltype(indices_of(call)){});
}

struct Definition {
  const char* names;  // canonical opcodes, separated by blanks
  Handler handler;
};

}  // namespace ptx
