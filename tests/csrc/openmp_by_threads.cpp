// SPDX-License-Identifier: Apache-2.0
// As much of GCC's OpenMP runtime as csrc/cpu uses, by std::thread. The thread sanitizer does not see into libgomp: it would
// miss its barriers and report races that are none. It sees into these. Tasks of a dynamic loop are dealt out like cards, a
// round at a time and each round from another thread on. OpenMP allows that, every thread takes part however short the
// loop, and no counter that threads share puts tasks into an order that OpenMP does not promise: it would hide a race.
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

class Team {
 public:
  explicit Team(int size) : size(size) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const long current = round;
    if (++waiting == size) {
      waiting = 0;
      round++;
      all_here.notify_all();
    }
    all_here.wait(lock, [&] { return round != current; });
  }

  const int size;

 private:
  std::mutex mutex;
  std::condition_variable all_here;
  int waiting = 0;
  long round = 0;
};

struct Loop {
  long start, end, chunk, next;  // next: number of the chunk to look at

  int owner(long number, int size) const {
    const long round = number / size;
    return int((number + (round * round + round) / 2) % size);
  }
};

thread_local Team* team = nullptr;
thread_local int thread_num = 0;
thread_local Loop loop;

}  // namespace

extern "C" {

int omp_get_thread_num() { return thread_num; }
int omp_get_num_threads() { return team ? team->size : 1; }
int omp_in_parallel() { return team != nullptr; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned) {
  Team all(num_threads ? int(num_threads) : int(std::thread::hardware_concurrency()));
  const auto run = [&](int number) {
    team = &all;
    thread_num = number;
    body(data);
    team = nullptr;
    thread_num = 0;
  };
  std::vector<std::thread> others;
  for (int number = 1; number < all.size; number++) others.emplace_back(run, number);
  run(0);
  for (std::thread& other : others) other.join();
}

void GOMP_barrier() {
  if (team) team->wait();
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* start, long* end) {
  while (loop.owner(loop.next, omp_get_num_threads()) != thread_num) loop.next++;
  *start = loop.start + loop.next++ * loop.chunk;
  *end = *start + loop.chunk < loop.end ? *start + loop.chunk : loop.end;
  return *start < loop.end;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long, long chunk, long* first, long* last) {
  loop = {start, end, chunk, 0};  // csrc/cpu counts upwards by ones
  return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}

}  // extern "C"
